"""Masks of an answer against those of its row, by our rules and by MedPLIB's."""

import numpy as np
import pytest

from engine.tasks.mecovqa.masks import dice_of_all, dice_of_none, score_masks


def square(size: int, level: int = 255, side: int = 10) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    mask[:size, :size] = level
    return mask


TRUTH = [square(4) > 0]
EMPTY = [square(0) > 0]


@pytest.mark.parametrize(
    "levels, truths, compat, dice, iou",
    [
        ([square(4)], TRUTH, "default", 1, 1),
        ([square(2)], TRUTH, "default", 2 * 4 / 20, 4 / 16),
        ([square(2)], TRUTH, "reference", 2 * 4 / 20, 4 / 16),
        ([square(4, 127)], TRUTH, "default", 0, 0),
        ([square(4, 128)], TRUTH, "default", 1, 1),
        ([square(4, 26)], TRUTH, "reference", 1, 1),
        ([square(4, 25)], TRUTH, "reference", 0, 0),
        ([], TRUTH, "default", 0, 0),
        ([], TRUTH, "reference", 0, 0),
        ([square(0)], EMPTY, "default", 1, 1),
        ([], EMPTY, "default", 1, 1),
        ([square(0)], EMPTY, "reference", 0, 0),
        ([square(3)], EMPTY, "default", 0, 0),
        ([square(4), square(2)], TRUTH, "default", 0.5, 0.5),
        ([square(4), square(2)], TRUTH, "reference", 1, 1),
        ([square(4)], [*TRUTH, square(2) > 0], "default", 0.5, 0.5),
        ([square(2), square(4)], [square(2) > 0, *TRUTH], "default", 1, 1),
    ],
)
def test_masks_are_compared_in_their_order(levels, truths, compat, dice, iou):
    assert score_masks(levels, truths, compat) == pytest.approx((dice, iou))


def test_a_mask_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"a mask is uint8 \(10, 10\), not uint8 \(8, 8\)"):
        score_masks([square(2, side=8)], TRUTH, "default")
    with pytest.raises(ValueError, match="not float64"):
        score_masks([square(2) / 255], TRUTH, "default")


def test_what_is_reached_without_looking():
    assert dice_of_all(TRUTH) == pytest.approx(2 * 16 / 116) and dice_of_none(TRUTH) == 0 and dice_of_none(EMPTY) == 1
