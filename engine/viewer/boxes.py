"""A model that was trained with boxes alone, made to follow points: they move the box.

A point outside the object cuts the box where that loses least, and nothing beyond the cut is part of the mask. A point inside
without a box is tried with boxes of several sizes around it; the mask that the model believes most is taken.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from engine.data.volumes.propagate import Box, Prompt
from engine.viewer.segmenter import BoxSegmenter

SIZES = (1 / 16, 1 / 10, 1 / 6, 1 / 4, 1 / 2.5, 1 / 1.6)  # of boxes around a lone point, in longest sides of the slice
Point = tuple[float, float]


class PointsByBoxes:
    """A `Segmenter`."""

    def __init__(self, model: BoxSegmenter, license: str):
        self.model, self.license = model, license

    def look(self, pixels: np.ndarray) -> tuple[Any, tuple[int, int]]:
        """As `Segmenter.look`, with the slice's size."""
        return self.model.look(pixels), (pixels.shape[0], pixels.shape[1])

    def segment(self, seen: tuple[Any, tuple[int, int]], prompt: Prompt) -> tuple[np.ndarray, float]:
        """As `Segmenter.segment`."""
        inside, outside = ([(x, y) for x, y, label in prompt.points if label == wanted] for wanted in (1, 0))
        box = around(prompt.box, inside)
        if prompt.box is None and min(box[2] - box[0], box[3] - box[1]) < 3:
            box = self._guess(*seen, inside[0])
        for point in outside:
            box = cut(box, point, inside)
        masks, scores = self.model.segment_boxes(seen[0], [box])
        if outside:
            x1, y1, x2, y2 = (int(side) for side in box)
            within = np.zeros_like(masks[0])
            within[y1:y2, x1:x2] = True
            masks = masks & within
        return masks[0], float(scores[0])

    def _guess(self, seen: Any, size: tuple[int, int], point: Point) -> Box:
        """The box around a lone point whose mask has the point and is believed most."""
        (x, y), boxes = point, []
        for share in SIZES:
            reach = max(2, round(max(size) * share / 2))
            boxes.append((max(0, x - reach), max(0, y - reach), min(size[1], x + reach + 1), min(size[0], y + reach + 1)))
        masks, scores = self.model.segment_boxes(seen, boxes)
        return boxes[int(np.argmax(np.where(masks[:, int(y), int(x)], scores, -1)))]


def around(box: Box | None, points: Iterable[Point]) -> Box:
    """The smallest box around a box, where there is one, and pixels at (x, y)."""
    corners = ([] if box is None else [box]) + [(x, y, x + 1, y + 1) for x, y in points]
    x1, y1, x2, y2 = zip(*corners, strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def cut(box: Box, point: Point, kept: list[Point]) -> Box:
    """The largest part of the box on one side of the point, with all of `kept` in it; the box itself where there is none."""
    (x1, y1, x2, y2), (x, y) = box, point
    if not (x1 <= x < x2 and y1 <= y < y2):
        return box
    sides = [(x1, y1, x, y2), (x + 1, y1, x2, y2), (x1, y1, x2, y), (x1, y + 1, x2, y2)]
    sides = [side for side in sides if side[0] < side[2] and side[1] < side[3] and around(side, kept) == side]
    return max(sides, key=lambda side: (side[2] - side[0]) * (side[3] - side[1]), default=box)
