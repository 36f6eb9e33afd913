"""From a lesion's mask to its bounding box, the share of the image it covers, and the name of the region it lies in.

    box       (x1, y1, x2, y2), pixels, of the largest region: x2 and y2 are one beyond its last column and row
    coverage  area / (H * W), where area is that of the polygon through the centres of the region's outermost pixels

Pixels that touch at a side or a corner belong to one region, and its holes count as filled. The area is OpenCV's `contourArea`,
with which the published records were made: one pixel, or a line, has area 0, and a full mask of 600 x 450 covers 599 * 449 /
(600 * 450) = 0.9961. It is computed without following the contour: of the square between four neighbouring pixel centres the
polygon holds all if the four belong to the region, half if three do, and otherwise nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOUCHING = np.ones((3, 3), dtype=bool)  # sides and corners


@dataclass(frozen=True)
class LesionBox:
    """The largest region of a mask: its box in pixels, and its area as a fraction of the image."""

    bbox: tuple[float, float, float, float]
    coverage: float


def find_lesion(mask: np.ndarray) -> LesionBox | None:
    """The largest region of lesion pixels (> 0) in a mask [H, W]; None where there are none.

    Among regions of the same area it is the one whose first pixel, in reading order, comes last, as with OpenCV.
    """
    from scipy import ndimage  # here, as below: it takes a third of a second, which reading flags does not need

    lesion = np.asarray(mask) > 0
    if lesion.ndim != 2:
        raise ValueError(f"mask is [H, W], not of shape {lesion.shape}")
    labels, _ = ndimage.label(lesion, TOUCHING)
    places = list(enumerate(ndimage.find_objects(labels), 1))
    places.sort(key=lambda place: -_largest_area(place[1]))
    largest: tuple[float, int] = (-1.0, 0)  # area, and the region's number: they are numbered by their first pixel
    best = None
    for number, place in places:
        if _largest_area(place) < largest[0]:
            break  # this region cannot be larger, nor can those that follow
        area = _polygon_area(labels[place] == number)
        if (area, number) > largest:
            largest, best = (area, number), place
    if best is None:
        return None
    rows, columns = best
    bbox = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
    return LesionBox(bbox, largest[0] / lesion.size)


def _largest_area(place: tuple[slice, slice]) -> int:
    """The largest area that a region within `place` can have."""
    rows, columns = place
    return (rows.stop - rows.start - 1) * (columns.stop - columns.start - 1)


def _polygon_area(region: np.ndarray) -> float:
    from scipy import ndimage

    filled = ndimage.binary_fill_holes(region).astype(np.int8)
    corners = filled[:-1, :-1] + filled[1:, :-1] + filled[:-1, 1:] + filled[1:, 1:]
    return float((corners == 4).sum() + 0.5 * (corners == 3).sum())


def name_region(bbox: Sequence[float], size: tuple[int, int]) -> str:
    """`upper-left` ... `lower-right` of an image of `size` (width, height): where the middle of the box lies.

    The published grid: the outer fifths of each side, and the three fifths between them, which include the limits.
    """
    (x1, y1, x2, y2), (width, height) = map(int, bbox), size
    return f"{_place(y1, y2, height, 'upper', 'lower')}-{_place(x1, x2, width, 'left', 'right')}"


def _place(low: int, high: int, side: int, first: str, last: str) -> str:
    middle, half = low + (high - low) // 2, side // 2
    return first if middle < 0.4 * half else last if middle > 1.6 * half else "center"
