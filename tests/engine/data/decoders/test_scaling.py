"""Deep values are as bright as their depth says, or their range where they are stored with an offset."""

import numpy as np

from engine.data.decoders.scaling import scale_deep


def test_signed_values_stored_with_an_offset_are_scaled_from_their_range():
    """DeepLesion: Hounsfield units + 32768, also with 0 where nothing was measured."""
    units = np.tile(np.linspace(-1000, 1000, 200), (160, 1)).round()
    stored = (units + 32768).astype(np.uint16)
    expected = (units + 1000) * (255 / 2000)
    assert np.abs(scale_deep(stored) - expected).max() <= 0.5
    stored[0] = 0
    assert np.abs(scale_deep(stored)[1:] - expected[1:]).max() <= 0.5 and not scale_deep(stored)[0].any()


def test_bright_images_without_an_offset_keep_their_brightness():
    wide = np.linspace(20000, 60000, 100).round().astype(np.uint16)[None]
    assert np.abs(scale_deep(wide) - wide * (255 / 65535)).max() <= 0.5
    assert (scale_deep(np.full((4, 4), 40000, np.uint16)) == 156).all()
    assert scale_deep(np.array([[3000, 3100]], np.uint16)).tolist() == [[187, 193]]


def test_signed_and_unbounded_values_are_scaled_from_their_range():
    for values in (np.array([[-5, 0, 5]]), np.array([[0.0, np.nan, 1.0]]), np.array([[0, 2**20, 2**21]]), np.array([[2.5, 2.5]])):
        scaled = scale_deep(values)
        assert scaled.dtype == np.uint8 and (scaled.min(), scaled.max()) == ((0, 255) if values.size == 3 else (0, 0))
