"""Views of images off the CPU are resized by Pillow's own weights: the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.loaders.views import mask_view, resize, resize_by_weights
from models.views import View

# (rows, columns) before and after; in the last two Pillow begins with the rows
SIZES = [((31, 47), (28, 28)), ((90, 60), (17, 60)), ((40, 56), (40, 112)), ((13, 17), (56, 84)), ((275, 400), (84, 112))]
SIZES += [((1, 5), (28, 140)), ((53, 69), (35, 82)), ((87, 20), (76, 40))]


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("bicubic", [True, False])
def test_weights_give_pillows_pixels(before, after, bicubic):
    """Noise of 0 and 255 overshoots everywhere."""
    generator = np.random.default_rng(0)
    for pixels in (generator.integers(0, 256, (*before, 3)), generator.integers(0, 2, (*before, 3)) * 255):
        image = torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1)
        expected = resize(image, after, bicubic=bicubic)
        assert expected.shape == (3, *after) and torch.equal(resize_by_weights(image, after, bicubic=bicubic), expected)


@pytest.mark.parametrize("after", [(28, 28), (70, 100), (31, 47)])
def test_masks_are_pillows_by_nearest(after):
    mask = (np.random.default_rng(0).random((31, 47)) > 0.5).astype(np.uint8) * 255
    expected = np.asarray(Image.fromarray(mask).resize((after[1], after[0]), Image.Resampling.NEAREST))
    made = mask_view(torch.from_numpy(mask), View(lambda *_: after, (0, 0, 0), (1, 1, 1), side=120))
    assert made.shape == (1, 120, 120) and np.array_equal(made[0, : after[0], : after[1]], expected)
    assert not made[:, after[0] :].any() and not made[:, :, after[1] :].any()
