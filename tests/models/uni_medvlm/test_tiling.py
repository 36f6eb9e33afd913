"""Where an image lies on its tiles, for any size, and that its pixels arrive there."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.uni_medvlm.encoder.pixels import CLIP, hybrid_pixels
from models.uni_medvlm.encoder.tiling import CANVASES, Layout, squared, windows

SIZES = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))
EXTREME = [(1, 20_000), (20_000, 1), (1, 1), (333, 1000), (1000, 333), (7, 7), (1414, 1000)]


def with_extremes(test):
    for size in EXTREME:
        test = example(size)(test)
    return settings(deadline=None)(given(SIZES)(test))


@with_extremes
def test_the_image_lies_within_its_canvas_in_its_aspect(size):
    layout = Layout.fit(size)
    assert (layout.columns, layout.rows) in CANVASES and 3 <= layout.num_views <= 5
    for tile in (336, 768):
        for box, width, height in (
            (layout.box(tile), layout.columns * tile, layout.rows * tile),
            (layout.global_box(tile), tile, tile),
        ):
            left, top, right, bottom = box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert abs((width - right) - left) <= 1 and abs((height - bottom) - top) <= 1  # in the middle
            # a side is rounded to a whole pixel, and is at least one
            scale = max((right - left) / size[0], (bottom - top) / size[1])
            assert abs(right - left - max(1, size[0] * scale)) <= 1 + size[0] / size[1]
            assert abs(bottom - top - max(1, size[1] * scale)) <= 1 + size[1] / size[0]
    assert max(layout.width, layout.height) == pytest.approx(1)


@with_extremes
def test_no_other_canvas_would_leave_less_empty(size):
    chosen = Layout.fit(size)
    for columns, rows in CANVASES:
        scale = min(columns / size[0], rows / size[1])
        assert size[0] * size[1] * scale**2 / (columns * rows) <= chosen.width * chosen.height + 1e-9


@with_extremes
def test_both_towers_and_both_scales_see_the_image_in_the_same_place(size):
    layout = Layout.fit(size)
    vit, convnext, whole = (np.array(box, dtype=float) for box in (layout.box(336), layout.box(768), layout.global_box(336)))
    assert np.abs(vit - convnext * 336 / 768).max() <= 1.5  # pixels
    longer = max(layout.columns, layout.rows)
    margin = np.array([longer - layout.columns, longer - layout.rows] * 2) * 336 / 2
    assert np.abs((vit + margin) / longer - whole).max() <= 1.5


@given(SIZES.map(lambda size: (size[0], size[0])))
def test_square_images_take_four_tiles(size):
    assert (Layout.fit(size).columns, Layout.fit(size).rows) == (2, 2)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="an image must have pixels, not 0 x 5"):
        Layout.fit((0, 5))


@given(st.sampled_from(CANVASES), st.integers(1, 5), st.integers(1, 3))
def test_windows_put_together_are_the_canvas(grid, side, channels):
    columns, rows = grid
    canvas = torch.arange(channels * rows * side * columns * side).reshape(channels, rows * side, columns * side)
    tiles = windows(canvas, columns, rows)
    again = torch.cat([torch.cat(list(tiles[row * columns : (row + 1) * columns]), -1) for row in range(rows)], -2)
    assert torch.equal(again, canvas)
    square = squared(canvas)
    longer = max(columns, rows) * side
    assert square.shape == (channels, longer, longer) and square.sum() == canvas.sum()


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (64, 64), (100, 40), (500, 1), (1, 500)])
def test_an_image_of_one_colour_is_that_colour_where_it_lies_and_nothing_elsewhere(size):
    views, canvas = hybrid_pixels(Image.new("RGB", size, (255, 0, 0)), tiling=True, vit_size=56, convnext_size=128)
    layout = Layout.fit(size)
    assert views.shape == (layout.num_views, 3, 56, 56) and canvas.shape == (3, layout.rows * 128, layout.columns * 128)
    red = (1 - CLIP[0][0]) / CLIP[1][0]
    left, top, right, bottom = layout.global_box(56)
    assert views[0, 0, top:bottom, left:right].sub(red).abs().max() < 1e-5
    assert (views[0, 0] != 0).sum() == (right - left) * (bottom - top)
    left, top, right, bottom = layout.box(128)
    assert (canvas[0] != 0).sum() == (right - left) * (bottom - top)
    left, top, right, bottom = layout.box(56)
    assert (views[1:, 0] != 0).sum() == (right - left) * (bottom - top)


def test_tiles_show_their_part_of_the_image():
    image = Image.new("L", (112, 112))
    image.paste(255, (56, 0, 112, 56))  # the upper right quarter
    views, _ = hybrid_pixels(image, tiling=True, vit_size=56, convnext_size=128)
    brightest = views[1:].mean((1, 2, 3)).argmax()
    assert brightest == 1 and views[0, 0, 10, 45] > views[0, 0, 45, 10]


def test_in_one_piece_an_image_is_stretched_to_both_squares():
    pixels = hybrid_pixels(Image.new("RGB", (30, 90), (255, 0, 0)))
    assert pixels.images_vit.shape == (1, 3, 336, 336) and pixels.images_convnext.shape == (3, 768, 768)
    assert (pixels.images_vit[0, 0] - pixels.images_vit[0, 0, 0, 0]).abs().max() < 1e-6
