"""A volume as slices across any of its three axes, in 256 levels."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.data.decoders.scaling import to_uint8
from engine.data.volumes.values import auto_window
from engine.viewer.segmenter import Segmenter

FARTHEST = 1e30  # from 0, of values that are told apart
KEPT = 24  # slices whose embedding is kept; LiteMedSAM's takes 4 MiB


class Stack:
    """`levels` [X, Y, Z] uint8, or [X, Y, Z, 3] of colours. `axis`: which the slices were most likely taken across."""

    def __init__(self, image: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)):
        """`image` [1 or 3, X, Y, Z] of any numbers; `spacing` in the order of its axes.

        Other numbers than uint8 are shown as `auto_window` has it; those that are not finite are as dark as the darkest.
        """
        if image.dtype != np.uint8:
            image = _shown(image)
        self.levels = image[0] if len(image) == 1 else np.ascontiguousarray(np.moveaxis(image, 0, -1))
        self.shape: tuple[int, int, int] = image.shape[1:]
        self.axis = max(range(3), key=lambda axis: (spacing[axis], -self.shape[axis], -axis))
        self._seen: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def pixels(self, axis: int, index: int) -> np.ndarray:
        """[H, W] or [H, W, 3]: the other two axes in their order."""
        return np.ascontiguousarray(self.levels.take(index, axis))

    def grey(self, axis: int, index: int) -> np.ndarray:
        """[H, W], the mean of colours."""
        pixels = self.pixels(axis, index)
        return pixels if pixels.ndim == 2 else pixels.mean(-1)

    def look(self, segmenter: Segmenter, axis: int, index: int) -> Any:
        """What the segmenter sees in a slice; of those that were asked for last it is kept."""
        seen = self._seen.pop((axis, index), None)
        self._seen[axis, index] = segmenter.look(self.pixels(axis, index)) if seen is None else seen
        while len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        return self._seen[axis, index]


def _shown(image: np.ndarray) -> np.ndarray:
    low, high = (float(np.clip(edge, -FARTHEST, FARTHEST)) for edge in auto_window(image))
    shown = np.empty(image.shape, np.uint8)
    for place in np.ndindex(image.shape[:2]):  # a part at a time: in between it is float64
        values = np.where(np.isfinite(image[place]), image[place].astype(np.float64).clip(-FARTHEST, FARTHEST), low)
        shown[place] = to_uint8(values, low, high)
    return shown
