"""What a user drew in a viewer, held against the volume: ValueError with one line where it does not lie in it.

Axes are those of the array that the viewer sent; a slice across one of them has the other two as rows and columns, in their order.
Intervals are half-open. `axis` is preferred, of those that what was drawn is flat in.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from engine.data.volumes.propagate import Box

Shape = tuple[int, int, int]
TOLD = 16  # points that a model is told of a scribble
NOWHERE = np.zeros((0, 3), int)


class Mark(NamedTuple):
    """One interaction."""

    include: bool  # the object is there, or is not
    axis: int  # it was drawn in a slice across this axis
    slice: int
    voxels: np.ndarray  # [K, 3] of which a model is told; may lie in other slices too
    box: Box | None = None  # x1, y1, x2, y2 in its slice; one where the object is not is cut out of the mask
    region: np.ndarray | None = None  # [y2 - y1, x2 - x1] bool: which pixels of the box are meant; None: all


def point_mark(coordinates: Sequence[float], include: bool, shape: Shape, axis: int) -> Mark:
    """A voxel."""
    voxel = [round(place) for place in coordinates]
    if any(not 0 <= place < length for place, length in zip(voxel, shape, strict=True)):
        raise ValueError(f"the point {voxel} lies outside the volume of {list(shape)} voxels")
    return Mark(include, axis, voxel[axis], np.array([voxel]))


def box_mark(intervals: Sequence[Sequence[float]], include: bool, shape: Shape, axis: int) -> Mark:
    """A box of one slice, [low, high] of each axis; what of it lies outside the volume is cut off."""
    cut = [[max(0, round(low)), min(side, round(high))] for (low, high), side in zip(intervals, shape, strict=True)]
    if any(low >= high for low, high in cut):
        raise ValueError(f"the box is empty in the volume of {list(shape)} voxels (expected [low, high], high excluded)")
    flat = _flat_axis([high - low for low, high in cut], axis)
    if flat is None:
        raise ValueError("the box is not flat (expected one slice: bbox3d is not among the capabilities)")
    (y1, y2), (x1, x2) = (cut[other] for other in range(3) if other != flat)
    return Mark(include, flat, cut[flat][0], NOWHERE, (x1, y1, x2, y2))


def drawn_mark(drawn: np.ndarray, corner: Sequence[int], include: bool, axis: int, *, closed: bool) -> Mark:
    """A scribble, or (`closed`) a lasso with what it encloses: `drawn` [A, B, C] is not 0 there; its first voxel lies at `corner`.

    A lasso lies in one slice. A scribble may pass through several; its slice is then the one across `axis` with most of it.
    """
    places = np.argwhere(drawn)
    if not len(places):
        raise ValueError("nothing is drawn (expected a voxel that is not 0)")
    low, high = places.min(0), places.max(0) + 1
    flat = _flat_axis((high - low).tolist(), axis)
    if flat is None and closed:
        raise ValueError("the lasso is not flat (expected one slice)")
    across = axis if flat is None else flat
    inner = int(np.bincount(places[:, across]).argmax())
    if not closed:
        told = places[np.unique(np.linspace(0, len(places) - 1, TOLD).round().astype(int))]
        return Mark(include, across, inner + corner[across], told + np.asarray(corner))
    (y1, y2), (x1, x2) = ((int(low[i]), int(high[i])) for i in range(3) if i != across)
    region = (drawn.take(inner, across) != 0)[y1:y2, x1:x2]
    deepest = np.unravel_index(ndimage.distance_transform_edt(np.pad(region, 1)).argmax(), np.add(region.shape, 2))
    voxel = np.insert(np.subtract(deepest, 1) + (y1, x1), across, inner) + np.asarray(corner)
    top, left = (corner[i] for i in range(3) if i != across)
    box = x1 + left, y1 + top, x2 + left, y2 + top
    return Mark(include, across, int(voxel[across]), voxel[None] if include else NOWHERE, box, region)


def _flat_axis(lengths: Sequence[int], preferred: int) -> int | None:
    return next((axis for axis in (preferred, 0, 1, 2) if lengths[axis] == 1), None)
