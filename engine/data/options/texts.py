"""Texts as they are compared: without markup, signs nobody sees, and differences of case and width."""

import re
import unicodedata
from functools import lru_cache

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COMMAND = re.compile(r"\\[a-zA-Z]+\s*\{([^{}]*)\}")  # \boxed{C}, \text{C}
_MARKUP = re.compile(r"</?(?:b|i|u|em|strong|p|span|code)>|<br ?/?>|\\[()\[\]]|[*`$]", re.IGNORECASE)
_NESTED = 8  # commands within commands that are looked into
_QUOTES = "\"'“”‘’„«»_"
_ENDS = _QUOTES + ".,;:!…。、"
_BULLET = re.compile(r"(?:[-–—•·>#]+\s+)+")
_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def clean(text: str) -> str:
    """The text without markup (bold, code, LaTeX, HTML), bullet, quotes and final stops around it; full-width signs as ASCII.

    White space is single blanks, signs without a width are left out, case stays.
    """
    text = unicodedata.normalize("NFKC", text)
    if not text.isascii():
        text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    for _ in range(_NESTED):
        text, count = _COMMAND.subn(r"\1", text)
        if not count:
            break
    text = " ".join(_MARKUP.sub(" " if "<" in text else "", text).split())
    return unwrap(text)


def unwrap(text: str) -> str:
    """The text without a bullet, quotes, final stops and brackets around the whole of it."""
    before = None
    while text != before:
        before = text
        text = text[match.end() :] if (match := _BULLET.match(text)) else text
        text = text.strip().lstrip(_QUOTES).rstrip(_ENDS).strip()
        if _is_wrapped(text):
            text = text[1:-1]
    return text


def _is_wrapped(text: str) -> bool:
    """Whether one pair of brackets stands around the whole text."""
    if len(text) < 2 or _PAIRS.get(text[0]) != text[-1]:
        return False
    depth = 0
    for character in text[:-1]:
        depth += (character == text[0]) - (character == text[-1])
        if depth == 0:
            return False
    return depth == 1


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """`clean`, and in lower case: texts that are equal so are the same to a reader."""
    return clean(text).casefold()
