"""What an answer about a skin lesion says: the diagnosis, the region of the image, the bounding box.

A well-formed `<diagnosis>`, `<location>` or `<bbox>` in a text, the last one, is read in place of the whole text. "Not a melanoma"
names no melanoma. All parsing is linear in the length of the model's text, whatever the text, and nothing of it is evaluated.
"""

import re
from collections.abc import Sequence

from engine.data.lesions import CODES

_TAGS = {name: re.compile(rf"<(/?){name}>", re.IGNORECASE | re.ASCII) for name in ("diagnosis", "location", "bbox")}
_NAMES = {
    "akiec": r"actinic keratos[ie]s",
    "bcc": r"basal cell carcinomas?",
    "bkl": r"benign keratos[ie]s(?:[- ]like lesions?)?",
    "df": r"dermatofibromas?",
    "mel": r"melanomas?",
    "nv": r"(?:melanocytic )?na?ev(?:us|i)",
    "vasc": r"vascular lesions?",
}
_NAME = re.compile(r"\b(?:" + "|".join(f"(?P<{code}>{name})" for code, name in _NAMES.items()) + r")\b")
_DENIED = re.compile(r"\b(?:not|no|non|rather than|instead of|without|unlike)(?: (?:a|an|the|in|be|to|likely)){0,4}[ -]$")
_SIDES = {"upper": "upper top", "center": "center centre central middle", "lower": "lower bottom", "left": "left", "right": "right"}
_SIDE_OF = {word: side for side, words in _SIDES.items() for word in words.split()}
_MIDDLE = _SIDES["center"].replace(" ", "|")
_REGION = re.compile(rf"\b(upper|top|lower|bottom|{_MIDDLE})[- ](left|right|{_MIDDLE})\b")
_LIST = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"-?[0-9]{1,6}(?:\.[0-9]{1,6})?")


def tagged(text: str, tag: str) -> str | None:
    """What the last well-formed pair of the tag encloses, or None."""
    content, start = None, None
    for found in _TAGS[tag].finditer(text):
        if not found[1]:
            start = found.end()
        elif start is not None:
            content, start = text[start : found.start()], None
    return content


def _denied(text: str, start: int) -> bool:
    return _DENIED.search(text[max(0, start - 40) : start]) is not None


def read_diagnosis(text: str) -> str | None:
    """The code of the one diagnosis that the text names; None where it names none or several. Tags may hold the code itself."""
    inside = tagged(text, "diagnosis")
    content = " ".join((text if inside is None else inside).lower().split())
    if inside is not None and content in CODES:
        return CODES[content]
    named = {found.lastgroup for found in _NAME.finditer(content) if not _denied(content, found.start())}
    return named.pop() if len(named) == 1 else None


def read_region(text: str) -> str | None:
    """The one region that the text names, as `upper-left`; None where it names none or several."""
    inside = tagged(text, "location")
    content = " ".join((text if inside is None else inside).lower().split())
    named = {
        f"{_SIDE_OF[found[1]]}-{_SIDE_OF[found[2]]}" for found in _REGION.finditer(content) if not _denied(content, found.start())
    }
    return named.pop() if len(named) == 1 else None


def read_box(text: str) -> tuple[float, ...] | None:
    """The last list of exactly four plain numbers, `[x1, y1, x2, y2]`; None where there is none or it is reversed or empty.

    Sides may lie outside of the image, which costs overlap; NaN, infinity, exponents and arithmetic are no plain numbers.
    """
    inside = tagged(text, "bbox")
    lists = [text] if inside is None else [inside]
    lists = _LIST.findall(lists[0]) or ([] if inside is None else lists)
    for content in reversed(lists):
        sides = content.replace(",", " ").split()
        if len(sides) == 4 and all(map(_NUMBER.fullmatch, sides)):
            x1, y1, x2, y2 = map(float, sides)
            return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
    return None


def box_iou(box: Sequence[float] | None, other: Sequence[float] | None) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where one is missing, reversed or empty."""
    if not box or not other or not all(b[0] < b[2] and b[1] < b[3] for b in (box, other)):
        return 0.0
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return common / (sum(areas) - common)
