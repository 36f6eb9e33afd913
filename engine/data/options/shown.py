"""The options that a question's text shows.

They are written `A)text, B)text` (Med-R1), as lines `A) text` (MedVLM-R1), `(A) text (B) text`, or as lines `A. text` or `A: text`;
the first of these that a text has is how it is read. Texts may hold commas, parentheses and single letters: an option ends where
the next letter's marker stands after a comma or line break with all parentheses closed. The last one ends before an instruction
(`... D) MRI. Please choose one.`) and, where no other has a line break, at the end of its line.
"""

import re
from typing import NamedTuple

from engine.data.options.texts import LETTERS, plain

MAX_STARTS = 16  # places tried for `A)`: a question has one or two
_STYLES = (
    re.compile(r"(?:(?<=[\s,;])|^)([A-Z])\)"),
    re.compile(r"(?:(?<=[\s,;])|^)\(([A-Z])\)"),
    re.compile(r"^[ \t]*([A-Z])[.:](?=\s)", re.MULTILINE),
)
_VERB = (
    r"(?:please\b|answer|choose|select|pick|provide|respond|reply|give|output|state|indicate|mark|tick|write|return|your task)\b"
)
_INSTRUCTION = re.compile(rf"(?<=[.;!?]) +{_VERB}.*|(?<![ ,;])[ ,;]*[(\[] *{_VERB}[^()\[\]]*[)\]]", re.IGNORECASE | re.DOTALL)
_LETTERED = re.compile(r"\(?([A-Za-z])[).:]\s*(.*)", re.DOTALL)


class _Marker(NamedTuple):
    """A letter and `)` in a question's text."""

    position: int
    end: int
    letter: str
    separated: bool  # the nearest thing before it is a comma, a semicolon or a line break
    depth: int  # parentheses open before it, less those closed
    after: int  # the same behind it


def parse_options(problem: str, *, apart: bool = False) -> dict[str, str]:
    """The options in a question's text as {"A": "text", ...}, at least two; {} if there are none.

    Where several `A)` could start the list, those without an empty text come first, then the longest, then that with most commas
    and line breaks between options, then the last. An option may still be empty. `apart`: only a list `A)text, B)text` or of lines
    `A) text`, which nothing else in a question looks like.
    """
    for style in _STYLES[:1] if apart else _STYLES:
        options, num_separated = _in_style(problem, style)
        if options and (not apart or num_separated == len(options) - 1 and all(options.values())):
            return options
    return {}


def _in_style(problem: str, style: re.Pattern) -> tuple[dict[str, str], int]:
    """The options, and how many of them a comma, a semicolon or a line break precedes."""
    markers = _find_markers(problem, style)
    best: dict[str, str] = {}
    rank = (False, 0, 0)
    for start in markers.get("A", [])[-MAX_STARTS:]:
        chain = [start]
        for letter in LETTERS[1:]:
            following = _next_marker(chain[-1], markers.get(letter, []))
            if following is None:
                break
            chain.append(following)
        options = _texts(problem, chain)
        new = (all(options.values()), len(chain), sum(marker.separated for marker in chain[1:]))
        if len(chain) >= 2 and new >= rank:
            best, rank = options, new
    return best, rank[2]


def _find_markers(problem: str, style: re.Pattern) -> dict[str, list[_Marker]]:
    markers: dict[str, list[_Marker]] = {}
    depth, done = 0, 0
    for match in style.finditer(problem):
        between, done = problem[done : match.start()], match.end()
        depth += between.count("(") - between.count(")")
        after = depth + match[0].count("(") - match[0].count(")")
        seen = between.rstrip()
        separated = seen.endswith((",", ";")) or "\n" in between[len(seen) :]
        markers.setdefault(match[1], []).append(_Marker(match.start(), match.end(), match[1], separated, depth, after))
        depth = after
    return markers


def _next_marker(current: _Marker, candidates: list[_Marker]) -> _Marker | None:
    """The first marker after `current` that is separated and outside parentheses, else only separated, else only outside."""
    later = [marker for marker in candidates if marker.position > current.position]
    outside = [marker for marker in later if marker.depth <= current.after]
    separated = [marker for marker in later if marker.separated]
    both = [marker for marker in outside if marker.separated]
    return next(iter(both or separated or outside), None)


def _texts(problem: str, chain: list[_Marker]) -> dict[str, str]:
    """The texts between the markers of a list."""
    ends = [marker.position for marker in chain[1:]]
    *others, last = [problem[a.end : b].strip() for a, b in zip(chain, [*ends, len(problem)], strict=True)]
    if not any("\n" in text for text in others):
        last = last.partition("\n")[0]
    without = _INSTRUCTION.sub("", last).rstrip()
    if without and without != last:
        last = without if any(text.rstrip(",; ").endswith(".") for text in others) else without.rstrip(".")
    return {marker.letter: text.rstrip(",;").rstrip() for marker, text in zip(chain, [*others, last], strict=True)}


def list_options(texts: list[str]) -> dict[str, str]:
    """["CT", "MRI"] -> {"A": "CT", "B": "MRI"}; letters that every text has in front, in their order, are not part of it."""
    lettered = [_LETTERED.fullmatch(text.strip()) for text in texts]
    if all(match and match[1].upper() == letter for match, letter in zip(lettered, LETTERS, strict=False)):
        texts = [match[2] for match in lettered if match]
    return {letter: text.strip() for letter, text in zip(LETTERS, texts, strict=False)}


def same_options(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two say the same, letter by letter, but for case, white space, markup and final stops."""
    return one.keys() == other.keys() and all(plain(text) == plain(other[letter]) for letter, text in one.items())
