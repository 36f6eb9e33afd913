"""A model of boxes follows points."""

import numpy as np
import pytest

from engine.data.volumes.propagate import Prompt
from engine.viewer.boxes import PointsByBoxes, around, cut


class Filler:
    """The mask is the box, believed the more the nearer it is to 20 pixels wide; beyond the box a column more."""

    name, license = "filler", "none"

    def look(self, pixels):
        return pixels.shape

    def segment_boxes(self, seen, boxes):
        masks = np.zeros((len(boxes), *seen), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[int(y1) : int(y2), int(x1) : int(x2) + 1] = True
        return masks, np.array([1 - abs(x2 - x1 - 20) / 100 for x1, _, x2, _ in boxes])


@pytest.fixture
def ask():
    model = PointsByBoxes(Filler())
    seen = model.look(np.zeros((80, 96), np.uint8))

    def box_of(box, *points):
        mask, score = model.segment(seen, Prompt(box, points))
        (top, *_, bottom), (left, *_, right) = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        assert mask.sum() == (bottom - top + 1) * (right - left + 1) and 0 < score <= 1
        return left, top, right + 1, bottom + 1

    return box_of


def test_a_box_is_asked_as_it_is_and_grows_to_points_inside(ask):
    assert ask((10, 20, 40, 50)) == (10, 20, 41, 50)
    assert ask((10, 20, 40, 50), (60, 30, 1), (12, 70, 1)) == (10, 20, 62, 71)


def test_a_point_outside_cuts_the_box_and_what_lies_beyond(ask):
    assert ask((10, 20, 40, 50), (35, 30, 0)) == (10, 20, 35, 50)
    assert ask((10, 20, 40, 50), (25, 22, 0)) == (10, 23, 40, 50)
    assert ask((10, 20, 40, 50), (35, 30, 0), (37, 40, 1)) == (10, 31, 40, 50), "what is inside is kept"
    assert ask((10, 20, 40, 50), (70, 30, 0)) == (10, 20, 40, 50)


def test_a_lone_point_gets_the_box_that_is_believed_most(ask):
    left, top, right, bottom = ask(None, (50, 40, 1))
    assert left < 50 < right and top < 40 < bottom and right - 1 - left == 17  # a sixth of 96 on both sides together, and itself
    assert ask(None, (50, 40, 1), (60, 44, 1)) == (50, 40, 62, 45), "several points are a box"


def test_cut_leaves_a_box_that_no_side_can_do_without():
    kept = [(2.0, 5.0), (8.0, 5.0), (5.0, 2.0), (5.0, 8.0)]
    assert cut((0, 0, 10, 10), (5.0, 5.0), kept) == (0, 0, 10, 10)
    assert around(None, kept) == (2, 2, 9, 9)
