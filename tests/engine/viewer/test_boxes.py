"""A model of boxes follows points."""

import numpy as np
import pytest

from engine.data.volumes.propagate import Prompt
from engine.viewer.boxes import PointsByBoxes, cut


class Filler:
    """The mask is the box, believed the more the nearer it is to 20 pixels wide; beyond the box a column more."""

    def look(self, pixels):
        return pixels.shape

    def segment_boxes(self, seen, boxes):
        masks = np.zeros((len(boxes), *seen), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[int(y1) : int(y2), int(x1) : int(x2) + 1] = True
        return masks, np.array([1 - abs(x2 - x1 - 20) / 100 for x1, _, x2, _ in boxes])


@pytest.mark.parametrize(
    "box, points, filled",
    [
        ((10, 20, 40, 50), [], (10, 20, 41, 50)),
        ((10, 20, 40, 50), [(60, 30, 1), (12, 70, 1)], (10, 20, 62, 71)),  # it grows to what is inside
        ((10, 20, 40, 50), [(35, 30, 0)], (10, 20, 35, 50)),  # cut where that loses least, and nothing beyond
        ((10, 20, 40, 50), [(25, 22, 0)], (10, 23, 40, 50)),
        ((10, 20, 40, 50), [(35, 30, 0), (37, 40, 1)], (10, 31, 40, 50)),  # what is inside is kept
        ((10, 20, 40, 50), [(70, 30, 0)], (10, 20, 40, 50)),
        (None, [(50, 40, 1), (60, 44, 1)], (50, 40, 62, 45)),  # several points are a box
        (None, [(50, 40, 1)], (42, 32, 60, 49)),  # a sixth of the longest side, which is believed most
    ],
)
def test_points_move_the_box(box, points, filled):
    model = PointsByBoxes(Filler(), "none")
    mask, score = model.segment(model.look(np.zeros((80, 96), np.uint8)), Prompt(box, tuple(points)))
    (top, *_, bottom), (left, *_, right) = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    assert mask.sum() == (bottom - top + 1) * (right - left + 1) and 0 < score <= 1
    assert (left, top, right + 1, bottom + 1) == filled


def test_a_box_that_no_side_can_do_without_is_left():
    assert cut((0, 0, 10, 10), (5.0, 5.0), [(2.0, 5.0), (8.0, 5.0), (5.0, 2.0), (5.0, 8.0)]) == (0, 0, 10, 10)
