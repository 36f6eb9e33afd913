"""One object in a volume: what was drawn, the mask so far, and the way back.

A mark asks for its slice anew: the model is told all that was drawn there and, where no box was, the box of the mask that is there.
From that slice the mask is carried to its neighbours (`engine/data/volumes/propagate.py`), until it vanishes, meets a slice that
was drawn in, or is what was there before. So the first box finds the object in all its slices, and a correction changes no more
than follows from it.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine.data.volumes.propagate import Box, Prompt, propagate
from engine.viewer.boxes import around
from engine.viewer.marks import Mark
from engine.viewer.segmenter import Segmenter
from engine.viewer.stack import Stack

Region = list[list[int]]  # [low, high] of each axis, high excluded
LEVELS, HISTORY_BYTES = 16, 2**26  # steps that can be undone, and what their masks may take
MOST_MARKS = 500
SAME = 0.95  # IoU from which a carried mask is what was there before


class _Turn(NamedTuple):
    """A slice to begin from; `asked`: anew, else with the mask that is there."""

    axis: int
    slice: int
    asked: bool


class _Step(NamedTuple):
    """How things stood before a mark."""

    marks: list[Mark]
    turns: list[_Turn]
    packed: bytes


class Segmentation:
    """`mask` [X, Y, Z] bool."""

    def __init__(self, stack: Stack):
        self.stack = stack
        self.clear()

    def clear(self) -> None:
        """As it was in the beginning."""
        self.mask = np.zeros(self.stack.shape, bool)
        self._marks: list[Mark] = []
        self._turns: list[_Turn] = []
        self._history: list[_Step] = []

    @property
    def plane(self) -> int:
        """The axis across which the slice of the last mark lies, or that of the volume's own slices."""
        return self._marks[-1].axis if self._marks else self.stack.axis

    @property
    def unfinished(self) -> bool:
        """Whether `predict` has something to do: new marks, or slices that it had no time for."""
        return bool(self._turns)

    def add(self, mark: Mark) -> None:
        """One more thing that was drawn. ValueError where there are too many."""
        if len(self._marks) >= MOST_MARKS:
            raise ValueError(f"{MOST_MARKS} interactions with one object are the most (expected reset_interactions, then fewer)")
        self._remember()
        self._marks.append(mark)
        self._turns.insert(0, _Turn(mark.axis, mark.slice, True))  # before what there was no time for

    def begin_with(self, mask: np.ndarray, *, refine: bool) -> None:
        """A mask [X, Y, Z] in place of all so far; `refine`: its largest slice is to be asked for anew."""
        self._remember()
        self.mask, self._marks, self._turns = mask.copy(), [], []
        if refine and mask.any():
            axis = self.stack.axis
            sizes = np.count_nonzero(mask, axis=tuple(other for other in range(3) if other != axis))
            self._turns.append(_Turn(axis, int(sizes.argmax()), True))

    def predict(self, segmenter: Segmenter, late: Callable[[], bool]) -> tuple[bool, Region | None]:
        """Whether there was something to do, and where the mask has changed. Once it is `late` no further slice is begun."""
        ran, before = self.unfinished, self.mask.copy()
        while self._turns:
            self._carry(self._turns.pop(0), segmenter, late)
            if late():
                break
        return ran, changed(before, self.mask)

    def undo(self) -> tuple[bool, Region | None]:
        """Takes the last mark back. Whether there was one, and where the mask has changed."""
        if not self._history:
            return False, None
        before = self.mask
        step = self._history.pop()
        self._marks, self._turns = step.marks, step.turns
        bits = np.frombuffer(zlib.decompress(step.packed), np.uint8)
        self.mask = np.unpackbits(bits, count=before.size).view(bool).reshape(before.shape)
        return True, changed(before, self.mask)

    def _remember(self) -> None:
        self._history.append(_Step(list(self._marks), list(self._turns), zlib.compress(np.packbits(self.mask).data, 1)))
        while len(self._history) > LEVELS or sum(len(step.packed) for step in self._history) > HISTORY_BYTES:
            self._history.pop(0)

    def _carry(self, turn: _Turn, segmenter: Segmenter, late: Callable[[], bool]) -> None:
        axis, first = turn.axis, turn.slice
        start = self._asked(axis, first) if turn.asked else Prompt(mask=self._plane(axis, first).copy())
        if start is None:
            return
        drawn_in = {mark.slice for mark in self._marks if mark.axis == axis}
        nothing = np.zeros_like(self._plane(axis, first)), 0.0  # ends the way

        def segment(place: int, prompt: Prompt) -> tuple[np.ndarray, float]:
            if place != first and place in drawn_in:
                return nothing
            if place != first and late():
                later = _Turn(axis, place - 1 if place > first else place + 1, False)
                self._turns += [] if later in self._turns else [later]
                return nothing
            told = prompt if place == first else Prompt(prompt.box, self._points(axis, place))
            mask, score = segmenter.segment(self.stack.look(segmenter, axis, place), told)
            mask = self._erased(mask, axis, place)
            return nothing if place != first and _same(mask, self._plane(axis, place)) else (mask, score)

        slices = self.stack.shape[axis]
        for drawn in propagate(segment, slices, {first: start}, grey=lambda place: self.stack.grey(axis, place)):
            self._plane(axis, drawn.slice)[:] = drawn.mask

    def _plane(self, axis: int, index: int) -> np.ndarray:
        return self.mask[(slice(None),) * axis + (index,)]

    def _points(self, axis: int, index: int) -> tuple[tuple[float, float, int], ...]:
        """(x, y, inside or outside) of all that was drawn through a slice."""
        found = []
        for mark in self._marks:
            rows, columns = (mark.voxels[mark.voxels[:, axis] == index][:, other] for other in range(3) if other != axis)
            found += [(float(x), float(y), int(mark.include)) for x, y in zip(columns, rows, strict=True)]
        return tuple(found)

    def _asked(self, axis: int, index: int) -> Prompt | None:
        """What the model is told of a slice that was drawn in; None where nothing says that the object is there."""
        boxes = [mark.box for mark in self._marks if mark.include and mark.box and (mark.axis, mark.slice) == (axis, index)]
        points = self._points(axis, index)
        inside = [(x, y) for x, y, label in points if label]
        box = boxes[-1] if boxes else _box_of(self._plane(axis, index))
        if box is None:
            return Prompt(None, points) if inside else None
        return Prompt(around(box, inside), points)

    def _erased(self, mask: np.ndarray, axis: int, index: int) -> np.ndarray:
        """Without the boxes and lassos that say where the object is not."""
        mask = mask.copy()
        for mark in self._marks:
            if mark.box and not mark.include and (mark.axis, mark.slice) == (axis, index):
                x1, y1, x2, y2 = (int(side) for side in mark.box)
                mask[y1:y2, x1:x2] &= False if mark.region is None else ~mark.region
        return mask


def changed(before: np.ndarray, after: np.ndarray) -> Region | None:
    """The smallest box around all voxels that differ; None where none does."""
    return _bounds(before != after)


def _bounds(voxels: np.ndarray) -> Region | None:
    lines = [np.flatnonzero(voxels.any(tuple(i for i in range(voxels.ndim) if i != axis))) for axis in range(voxels.ndim)]
    return [[int(line[0]), int(line[-1]) + 1] for line in lines] if len(lines[0]) else None


def _box_of(mask: np.ndarray) -> Box | None:
    if (bounds := _bounds(mask)) is None:
        return None
    (y1, y2), (x1, x2) = bounds
    return x1, y1, x2, y2


def _same(mask: np.ndarray, before: np.ndarray) -> bool:
    either = int(np.count_nonzero(mask | before))
    return either == 0 or int(np.count_nonzero(mask & before)) >= SAME * either
