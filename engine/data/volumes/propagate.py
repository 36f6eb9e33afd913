"""One structure through the slices of a volume, given a prompt in one slice or a few: a model of images, asked slice by slice.

    mask(s)     = segment(s, prompt in s)                              s a slice with a prompt
    mask(s + 1) = segment(s + 1, box of mask(s), grown by a margin)    and so on upwards, and downwards alike

until the mask vanishes, or is no continuation of the one before: it hardly overlaps it, is far larger, or is of another brightness.
Between two prompts each slice is reached from the nearer one. Nothing here knows a model, a volume or a file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prompt:
    """What is asked of one slice, in its pixels: at least one of the three."""

    box: Box | None = None  # x1, y1, x2, y2
    points: tuple[tuple[float, float, int], ...] = ()  # (x, y, label): 1 inside, 0 outside
    mask: np.ndarray | None = None  # [H, W] bool, a mask that is there already; alone it is taken as it is


class Drawn(NamedTuple):
    """The mask of one slice."""

    slice: int
    mask: np.ndarray  # [H, W] bool
    score: float  # the model's own; 1 of a mask that was given


Segment = Callable[[int, Prompt], tuple[np.ndarray, float]]  # slice, prompt -> mask [H, W] bool, score


@dataclass(frozen=True)
class Carrying:
    """When a mask is a continuation of its neighbour's."""

    margin: float = 0.08  # the next box is larger than the mask by this part of its sides, and at least by least_margin pixels
    least_margin: float = 2.0
    least_pixels: int = 4  # a mask of fewer has vanished
    most_growth: float = 1.8  # times the neighbour's pixels
    least_overlap: float = 0.4  # of the smaller of the two masks
    least_score: float = 0.3
    most_change: float = 1.5  # of the mean grey inside, in standard deviations inside the prompted mask, or half the contrast


def propagate(
    segment: Segment,
    num_slices: int,
    prompts: Mapping[int, Prompt],
    *,
    grey: Callable[[int], np.ndarray] | None = None,
    carrying: Carrying = Carrying(),
) -> Iterator[Drawn]:
    """The masks of one structure, one a slice at most: each prompt's slice, then its neighbours upwards, then downwards.

    `grey(s)` [H, W]: the values of a slice; with it, a mask whose mean leaves that of the prompted one ends the way too.
    A slice is asked for once. ValueError for a slice outside 0 to num_slices - 1 or an empty prompt.
    """
    given = sorted(prompts)
    for start in given:
        if not 0 <= start < num_slices:
            raise ValueError(f"slice {start}: expected 0 to {num_slices - 1}")
        first = _first(segment, start, prompts[start])
        yield first
        looks = None if grey is None else _Looks.of(grey(start), first.mask, carrying)
        above = next((other for other in given if other > start), None)
        below = next((other for other in reversed(given) if other < start), None)
        highest = num_slices - 1 if above is None else (start + above) // 2  # of two equally near prompts the lower one's
        lowest = 0 if below is None else (start + below) // 2 + 1
        for way in (range(start + 1, highest + 1), range(start - 1, lowest - 1, -1)):
            before = first.mask
            for place in way:
                box = carried_box(before, carrying)
                if box is None:
                    break
                mask, score = segment(place, Prompt(box=box))
                alike = looks is None or grey is None or looks.holds(grey(place), mask)
                if not (continues(mask, before, carrying) and score >= carrying.least_score and alike):
                    break
                yield Drawn(place, mask, score)
                before = mask


def carried_box(mask: np.ndarray, carrying: Carrying = Carrying()) -> Box | None:
    """The box of a mask [H, W], grown by the margin and cut at the image's edge; None of a mask that has vanished."""
    if np.count_nonzero(mask) < carrying.least_pixels:
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    sides = []
    for found, length in ((columns, mask.shape[1]), (rows, mask.shape[0])):
        low, high = float(found[0]), float(found[-1] + 1)
        grown = max(carrying.least_margin, carrying.margin * (high - low))
        sides.append((max(0.0, low - grown), min(float(length), high + grown)))
    (x1, x2), (y1, y2) = sides
    return x1, y1, x2, y2


def continues(mask: np.ndarray, before: np.ndarray, carrying: Carrying = Carrying()) -> bool:
    """Whether a mask [H, W] may be of the structure that its neighbour shows."""
    size, size_before = np.count_nonzero(mask), np.count_nonzero(before)
    if size < carrying.least_pixels or size > carrying.most_growth * size_before:
        return False
    return bool(np.count_nonzero(mask & before) >= carrying.least_overlap * min(size, size_before))


def _first(segment: Segment, start: int, prompt: Prompt) -> Drawn:
    if prompt.box is None and not prompt.points:
        if prompt.mask is None:
            raise ValueError(f"slice {start}: a prompt without box, points and mask")
        return Drawn(start, np.asarray(prompt.mask, bool), 1.0)
    return Drawn(start, *segment(start, prompt))


class _Looks(NamedTuple):
    """The brightness inside a mask, and how far from it a neighbour's may be: not nearer to what lies around the mask."""

    mean: float
    tolerance: float

    @classmethod
    def of(cls, values: np.ndarray, mask: np.ndarray, carrying: Carrying) -> "_Looks | None":
        box = carried_box(mask, carrying)
        if box is None:
            return None
        x1, y1, x2, y2 = (round(side) for side in box)
        values, mask = values[y1:y2, x1:x2].astype(np.float64), mask[y1:y2, x1:x2]
        inside, around = values[mask], values[~mask]
        contrast = abs(float(inside.mean() - around.mean())) if around.size else 0.0
        return cls(float(inside.mean()), max(carrying.most_change * float(inside.std()), contrast / 2, 1e-6))

    def holds(self, values: np.ndarray, mask: np.ndarray) -> bool:
        inside = values[mask].astype(np.float64)
        return bool(inside.size and abs(inside.mean() - self.mean) <= self.tolerance)
