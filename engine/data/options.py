"""Answer options of a multiple-choice question: from the question's text, from a list, and back from an answer to its letter."""

import re
from typing import NamedTuple

LETTERS = "ABCDEFGHIJ"
MAX_STARTS = 16  # places tried for `A)`: a question has one or two
_LETTER_AND_BRACKET = re.compile(r"[A-J]\)")
_LETTER_ANSWER = re.compile(r"\(([A-Ja-j])\)|([A-Ja-j])[).]?")
_LETTER_AND_TEXT = re.compile(r"([A-Ja-j])\)(.+)", re.DOTALL)


class _Marker(NamedTuple):
    """A letter and `)` in a question's text."""

    position: int
    letter: str
    separated: bool  # the nearest thing before it is a comma, a semicolon or a line break
    depth: int  # parentheses open before it, less those closed


def parse_options(problem: str) -> dict[str, str]:
    """Options of `... A)text, B)text` (Med-R1) or of lines `A) text` (MedVLM-R1), as {"A": "text", ...}; {} if there are none.

    Texts may hold commas, parentheses and single letters: an option ends where the next letter's marker stands after a comma
    or line break with all parentheses closed. Where several `A)` could start the list, the longest, then the last list wins.
    """
    markers = _find_markers(problem)
    best: list[_Marker] = []
    for start in [marker for marker in markers if marker.letter == "A"][-MAX_STARTS:]:
        chain = [start]
        for letter in LETTERS[1:]:
            following = _next_marker(chain[-1], [marker for marker in markers if marker.letter == letter])
            if following is None:
                break
            chain.append(following)
        if len(chain) >= max(2, len(best)):
            best = chain
    ends = [marker.position for marker in best[1:]] + [len(problem)]
    texts = [problem[marker.position + 2 : end].strip() for marker, end in zip(best, ends, strict=False)]
    return {marker.letter: text.rstrip(",;").rstrip() for marker, text in zip(best, texts, strict=True)}


def _find_markers(problem: str) -> list[_Marker]:
    markers, depth, done = [], 0, 0
    for match in _LETTER_AND_BRACKET.finditer(problem):
        between, done = problem[done : match.start()], match.start()
        depth += between.count("(") - between.count(")")
        seen = between.rstrip()
        separated = seen.endswith((",", ";")) or "\n" in between[len(seen) :]
        if done == 0 or problem[done - 1].isspace() or problem[done - 1] in ",;":
            markers.append(_Marker(done, match[0][0], separated, depth))
    return markers


def _next_marker(current: _Marker, candidates: list[_Marker]) -> _Marker | None:
    """The first marker after `current` that is separated and outside parentheses, else only separated, else only outside."""
    later = [marker for marker in candidates if marker.position > current.position]
    outside = [marker for marker in later if marker.depth < current.depth]  # current's own `)` closes one
    separated = [marker for marker in later if marker.separated]
    both = [marker for marker in outside if marker.separated]
    return next(iter(both or separated or outside), None)


def list_options(texts: list[str]) -> dict[str, str]:
    """["CT", "MRI"] -> {"A": "CT", "B": "MRI"}."""
    return {letter: text.strip() for letter, text in zip(LETTERS, texts, strict=False)}


def match_option(answer: str, options: dict[str, str]) -> str | None:
    """The letter that an answer names: `C`, `c`, `C)`, `(C)`, `C.`, `C) text`, or exactly an option's text; otherwise None.

    Case and runs of white space do not matter. `C) text` whose text is another option's contradicts itself: None. A text that
    two options share names neither.
    """
    answer = answer.strip()
    if match := _LETTER_ANSWER.fullmatch(answer):
        letter = (match[1] or match[2]).upper()
        if letter in options:
            return letter
    if match := _LETTER_AND_TEXT.fullmatch(answer):
        letter, named = match[1].upper(), _same_text(match[2], options)
        return letter if letter in options and (not named or letter in named) else None
    named = _same_text(answer, options)
    return named[0] if len(named) == 1 else None


def _same_text(text: str, options: dict[str, str]) -> list[str]:
    plain = " ".join(text.split()).casefold()
    return [letter for letter, option in options.items() if " ".join(option.split()).casefold() == plain]
