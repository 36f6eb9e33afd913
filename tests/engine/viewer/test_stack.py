"""A volume in levels, and across which axis its slices were taken."""

import numpy as np
import pytest

from engine.viewer.stack import KEPT, Stack
from tests.engine.viewer.bright import Bright


@pytest.mark.parametrize(
    "shape, spacing, axis",
    [((9, 40, 50), (5, 1, 1), 0), ((40, 50, 9), (1, 1, 5), 2), ((40, 9, 50), (1, 1, 1), 1), ((20, 20, 20), (1, 1, 1), 0)],
)
def test_slices_lie_across_the_widest_spacing_or_the_fewest_voxels(shape, spacing, axis):
    assert Stack(np.zeros((1, *shape), np.uint8), spacing).axis == axis


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64, np.float16, np.float32, np.float64])
def test_numbers_of_any_type_are_spread_over_the_levels(dtype):
    levels = Stack(np.arange(1000).reshape(1, 10, 10, 10).astype(dtype)).levels
    assert levels.dtype == np.uint8 and levels.shape == (10, 10, 10) and levels.min() == 0 and levels.max() == 255
    assert (np.diff(levels.ravel().astype(int)) >= 0).all()


def test_what_is_not_finite_is_dark_and_what_is_enormous_breaks_nothing():
    values = np.linspace(-1000, 1000, 1000).reshape(1, 10, 10, 10)
    values[0, 0, 0, :5] = [np.nan, np.inf, -np.inf, 1e308, -1e308]
    levels = Stack(values).levels
    assert levels[0, 0, :5].tolist() == [0, 0, 0, 255, 0] and 120 < levels[5, 0, 0] < 135
    for constant in (np.full((1, 2, 3, 4), np.nan), np.zeros((1, 2, 3, 4)), np.full((1, 2, 3, 4), 7, np.int16)):
        assert len(np.unique(Stack(constant).levels)) == 1


def test_colours_stay_and_a_slice_is_looked_at_once_while_it_is_kept():
    image = np.random.default_rng(0).integers(0, 255, (3, 40, 5, 6), np.uint8)
    stack, model = Stack(image), Bright()
    assert (stack.pixels(1, 2) == image[:, :, 2].transpose(1, 2, 0)).all() and stack.grey(1, 2).shape == (40, 6)
    for index in [*range(KEPT), *range(KEPT), 39, 1, 0]:
        stack.look(model, 0, index)
    assert model.looked == [(5, 6, 3)] * (KEPT + 2), "the one that was asked for longest ago has gone"
