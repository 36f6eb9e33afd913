"""Where a lesion lies: mask -> position, position -> words, words -> position (PRS-Med, arXiv:2505.11872).

Two rules are published, both in pixels of a mask [H, W] whose centre is c = (H // 2, W // 2) or (H / 2, W / 2):

    prs-med      one position: "center" where the bounding box of all lesion pixels holds c; else the quadrant of the box's middle,
                 `near` where that is closer to c than W / 5. ("center" is always near.)
    our-dataset  one position for each of the two largest connected regions: the quadrant of the region's centroid, `near` where
                 that is closer to c than 20 pixels. There is no "center".

A text is read by fixed rules, never by a model: see `read_positions`.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("prs-med", "our-dataset")
NEAR_FRACTION, NEAR_PIXELS = 0.2, 20.0  # of the width; of a centroid's distance
MAX_REGIONS = 2

# Question and answer of training rows, and those of test rows, which training never shows.
TRAIN_TEMPLATES = (
    ("Where is the {finding} in this {modality}?", "The {finding} is in the {position}."),
    ("In which part of this {modality} does the {finding} lie?", "The {finding} lies in the {position}."),
    ("Please locate the {finding} in the {modality}.", "In this {modality} the {finding} is found in the {position}."),
    ("What is the position of the {finding}?", "The position of the {finding} is the {position}."),
    ("Which area of the {modality} shows a {finding}?", "A {finding} shows in the {position}."),
    ("Mark the {finding} and say where it is.", "The marked {finding} is in the {position}."),
    ("Does this {modality} contain a {finding}, and where?", "Yes, there is a {finding} in the {position}."),
    ("Tell me where to look for the {finding} in this {modality}.", "Look in the {position}."),
    ("Segment the {finding} and describe its position.", "The segmented {finding} occupies the {position}."),
    ("Where in the {modality} would you outline the {finding}?", "I would outline the {finding} in the {position}."),
)
TEST_TEMPLATES = (
    ("Can you point out where the {finding} is in this {modality}?", "The {finding} can be seen in the {position}."),
    ("Describe the location of the {finding} in the given {modality}.", "The {finding} is located in the {position}."),
    ("Which region of this {modality} is affected by the {finding}?", "The affected region is the {position}."),
)


@dataclass(frozen=True)
class Position:
    """A place ("center", "top left", ...; read from a text also "top" or "left" alone) and whether it is near the centre."""

    place: str
    near: bool | None = None


def locate(mask: np.ndarray, rule: str = "prs-med") -> tuple[Position, ...]:
    """The positions of the lesion pixels (> 0) of a mask [H, W]; none for an empty mask."""
    if rule not in RULES:
        raise ValueError(f"rule is one of {', '.join(RULES)}, not {rule!r}")
    lesion = np.asarray(mask) > 0
    if lesion.ndim != 2:
        raise ValueError(f"mask is [H, W], not of shape {lesion.shape}")
    if not lesion.any():
        return ()
    return (_locate_box(lesion),) if rule == "prs-med" else _locate_regions(lesion)


def _locate_box(lesion: np.ndarray) -> Position:
    (top, bottom), (left, right) = (np.flatnonzero(lesion.any(axis=axis))[[0, -1]] for axis in (1, 0))
    center_y, center_x = (side // 2 for side in lesion.shape)
    if top <= center_y <= bottom and left <= center_x <= right:
        return Position("center", True)
    y, x = (top + bottom) // 2, (left + right) // 2
    near = np.hypot(y - center_y, x - center_x) < NEAR_FRACTION * lesion.shape[1]
    return Position(_quadrant(y < center_y, x < center_x), bool(near))


def _locate_regions(lesion: np.ndarray) -> tuple[Position, ...]:
    from scipy import ndimage  # here: only this rule needs it, and it takes a third of a second

    regions, _ = ndimage.label(lesion)
    areas = np.bincount(regions.ravel())[1:]
    largest = np.argsort(-areas, kind="stable")[:MAX_REGIONS] + 1
    center = np.array(lesion.shape) / 2
    centroids = np.array(ndimage.center_of_mass(lesion, regions, largest))
    return tuple(
        Position(_quadrant(*(centroid < center)), bool(np.hypot(*(centroid - center)) < NEAR_PIXELS)) for centroid in centroids
    )


def _quadrant(above: bool, left: bool) -> str:
    return f"{'top' if above else 'bottom'} {'left' if left else 'right'}"


def describe(positions: Sequence[Position], rule: str = "prs-med") -> str:
    """Words that fill `{position}` in the templates: `top left, far from the center`, or as `our-dataset` has them."""
    if rule == "prs-med":
        (position,) = positions
        distance = "" if position.place == "center" else ", near the center" if position.near else ", far from the center"
        return position.place + distance
    first, *others = positions
    text = f"{first.place} region{' and near the center' if first.near else ''}"
    for other in others:
        text += f", and another tumour is located in the {other.place} quadrant{', near the center' if other.near else ''}"
    return text


def label(positions: Sequence[Position], rule: str = "prs-med") -> str:
    """The `position` column: one published sentence for prs-med, the bare description for our-dataset."""
    if rule == "our-dataset":
        return describe(positions, rule)
    (position,) = positions
    return f"The tumor is located in position {position.place} and {'near' if position.near else 'far from'} the center."


def ask(
    positions: Sequence[Position], rng: random.Random, *, finding: str, modality: str, rule: str, test: bool
) -> tuple[str, str]:
    """A question and its answer, from the training or the test templates."""
    question, answer = rng.choice(TEST_TEMPLATES if test else TRAIN_TEMPLATES)
    words = {"finding": finding, "modality": modality, "position": describe(positions, rule)}
    return question.format(**words), answer.format(**words)


# How a text is read.
WORDS = {
    "top": "top upper uppermost superior superiorly topmost",
    "bottom": "bottom lower lowermost inferior inferiorly bottommost",
    "left": "left leftmost leftward leftwards",
    "right": "right rightmost rightward rightwards",
}
SIDE_OF = {word: side for side, words in WORDS.items() for word in words.split()}
VERTICAL = "|".join(f"{WORDS['top']} {WORDS['bottom']}".split())
HORIZONTAL = "|".join(f"{WORDS['left']} {WORDS['right']}".split())
PLACES = ("top", "bottom", "left", "right", "top left", "top right", "bottom left", "bottom right")
JOINED = r"(?: (?:and|and to the|to the|hand|most|of the|(?:part|side|portion|half) of the))? "
SIDE = re.compile(rf"\b(?:{VERTICAL}|{HORIZONTAL})\b")
PAIR = re.compile(rf"\b(?:(?:{VERTICAL}){JOINED}(?:{HORIZONTAL})|(?:{HORIZONTAL}){JOINED}(?:{VERTICAL}))\b")
CENTER = r"\b(?:cent(?:er|re|ral|rally|ered|red)|middle|midline|midpoint)\b"
BETWEEN = r"(?: (?:from|to|in|at|near|close|adjacent|next|around|the|of|its|a|very|too|exact|directly|particularly|image)){0,6}"
FAR = re.compile(rf"\b(?:far|away|distant|remote|outside|not|rather than|instead of){BETWEEN} (?:{CENTER})")
DENIED = re.compile(r"\b(?:not|rather than|instead of)(?: (?:in|at|on|the|near|to)){0,4} ?$")
RIGHT_AT = re.compile(rf"\bright (?=(?:in|at|on) the (?:\w+ )?{CENTER})")  # "right in the center" is not on the right


def read_positions(text: str) -> tuple[Position, ...]:
    """The positions a text names, in its order, each once; none where it names no place.

    Neighbouring words count first ("upper-left", "left lower", "bottom and right"). A text without such a pair may name its sides
    apart ("the upper part, on the left") or one side alone; else "center", "middle" or "near the center" is the centre, which
    beside a pair only says that it is near. "Far from" or "not near the center" says that it is not. What follows "not", "rather
    than" or "instead of" is no place.
    """
    text = " ".join(re.sub(r"[-_/*\"'`()]", " ", text.lower()).split())
    text = RIGHT_AT.sub("", text)
    far = [match.span() for match in FAR.finditer(text)]
    centers = [match.start() for match in re.finditer(CENTER, text) if not any(a <= match.start() < b for a, b in far)]
    places = [(match.start(), _name(match[0])) for match in PAIR.finditer(text) if not _denied(text, match.start())]
    places = places or _read_sides(text) or [(at, "center") for at in centers[:1]]
    found: dict[str, Position] = {}
    for i, (start, place) in enumerate(places):
        begin, end = (start if i else 0), (places[i + 1][0] if i + 1 < len(places) else len(text))
        near: bool | None = True if place == "center" or any(begin <= at < end for at in centers) else None
        if any(begin <= at < end for at, _ in far):
            near = False
        found.setdefault(place, Position(place, near))
    return tuple(found.values())


def _denied(text: str, start: int) -> bool:
    return DENIED.search(text[max(0, start - 40) : start]) is not None


def _name(words: str) -> str:
    """`upper right-hand` -> `top right`."""
    sides = {SIDE_OF[match[0]] for match in SIDE.finditer(words)}
    return " ".join(side for side in WORDS if side in sides)


def _read_sides(text: str) -> list[tuple[int, str]]:
    """Sides named apart: one vertical and one horizontal, or one alone. Opposite sides together name no place."""
    named = [match for match in SIDE.finditer(text) if not _denied(text, match.start())]
    place = _name(" ".join(match[0] for match in named))
    return [(named[0].start(), place)] if place in PLACES else []


def same_places(truth: Iterable[Position], answer: Iterable[Position]) -> bool:
    """Whether an answer names exactly the places of the truth, in any order."""
    return {position.place for position in truth} == {position.place for position in answer}
