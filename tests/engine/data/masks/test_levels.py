"""The lesion of a grey mask is found by its values and where they lie, and what can be read in two ways is refused."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage import data

from engine.data.masks.levels import UnclearMask, find_lesion_pixels
from tests.engine.data.masks.shapes import AROUND, CORE, SHAPE, A, B, dice, disk, encoded, painted


def jpeg(picture: np.ndarray, quality: int = 75) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(picture, "JPEG", quality=quality))))


def blurred(radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(painted((A, 255))).filter(ImageFilter.GaussianBlur(radius)))


def bright_picture() -> np.ndarray:
    """[160, 200] uint8: grain between 200 and 250, nothing of it dark."""
    return np.random.default_rng(0).integers(200, 251, SHAPE, np.uint8)


def instances() -> np.ndarray:
    """[160, 200] uint16: ids of many squares that do not touch, more than 8 bits hold."""
    ids = np.zeros(SHAPE, np.uint16)
    for i, (row, column) in enumerate(np.ndindex(15, 19)):
        ids[10 * row + 2 : 10 * row + 9, 10 * column + 2 : 10 * column + 9] = i + 1
    return ids


LARGE = np.kron(A, np.ones((4, 4), np.uint8)) * np.uint8(255)
CLEAR = {
    "0 and 1": (painted((A, 1)), A),
    "0 and 255": (painted((A, 255)), A),
    "0 and 100": (painted((A, 100)), A),
    "booleans": (A, A),
    "floats": (A.astype(np.float32), A),
    "probabilities with soft edges": (blurred(1) / 255, A),
    "16 bits": (A.astype(np.uint16) * 65535, A),
    "5 and 250": (painted((A, 250), ground=5), A),
    "one label of 16 bits": (A.astype(np.uint16) * 300, A),
    "labels 1 and 200 apart": (painted((A, 1), (B, 200)), A | B),
    "labels 1 and 2 apart": (painted((A, 1), (B, 2)), A | B),
    "127 and 255 apart": (painted((A, 127), (B, 255)), A | B),
    "instances": (instances(), instances() > 0),
    "a rim of 255": (painted((AROUND, 255), (A, 1)), A),
    "rims of 255 around two labels": (painted((AROUND, 255), (disk(150, 120, 18), 255), (A, 1), (B, 2)), A | B),
    "a line of 1 around 255": (painted((disk(50, 40, 21), 1), (A, 255)), A),
    "JPEG": (jpeg(painted((A, 255))), A),
    "JPEG of low quality": (jpeg(painted((A, 255)), 15), A),
    "JPEG of 100": (jpeg(painted((A, 100))), A),
    "soft edges": (blurred(1), A),
    "made smaller": (np.asarray(Image.fromarray(LARGE).resize(SHAPE[::-1], Image.Resampling.BICUBIC)), A),
    "soft edges of three pixels": (blurred(2), A),
    "a stray 1 beside 255": (painted((A, 255), (disk(150, 120, 1), 1)), A),
    "all of the image but a speck": (painted((disk(3, 3, 2), 0), ground=255), ~disk(3, 3, 2)),
    "all": (painted(ground=255), np.ones(SHAPE, bool)),
}


@pytest.mark.parametrize("values, meant", CLEAR.values(), ids=CLEAR)
def test_what_is_clear_is_read_as_it_is_meant(values, meant):
    assert dice(find_lesion_pixels(values), meant) > 0.99


def test_an_empty_mask_is_empty():
    for values in (painted(), np.zeros(SHAPE, np.float64), np.zeros(SHAPE, bool)):
        assert not find_lesion_pixels(values).any()


UNCLEAR = {
    "an organ and its tumour": (painted((A, 1), (CORE, 2)), "the values 0, 1 and 2"),
    "disc and cup": (painted((A, 128), (CORE, 0), ground=255), "the values 0, 128 and 255"),
    "two bright labels that touch": (painted((A, 200), (CORE, 255)), "the values 0, 200 and 255"),
    "labels without a background": (painted((A, 2), ground=1), "the values 1 and 2 and no 0"),
    "1 and 255 apart": (painted((A, 1), (B, 255)), "the values 0, 1 and 255"),
    "255 inside 1": (painted((A, 1), (CORE, 255)), "the values 0, 1 and 255"),
    "255 far around 1": (painted((disk(50, 40, 35), 255), (A, 1)), "the values 0, 1 and 255"),
    "the lesion is black": (painted((A, 0), ground=255), "the values 0 and 255, the higher ones all around the lower"),
    "the lesion is black in a JPEG": (jpeg(painted((A, 0), ground=255)), "the higher ones all around the lower"),
    "a bright photograph": (bright_picture(), "values, most often "),
    "JPEG of two labels": (jpeg(painted((A, 127), (CORE, 255))), "values, most often 0, "),
    "blurred": (blurred(6), "values, most often 0, "),
    "a photograph": (data.camera(), "values, most often "),
    "a slope": (np.tile(np.arange(SHAPE[1]), (SHAPE[0], 1)), "200 values"),
    "negative values": (A.astype(np.int16) - 1, "negative values (the values -1 and 0)"),
    "no numbers": (np.where(A, np.nan, 0), "some values are not numbers"),
}


@pytest.mark.parametrize("values, said", UNCLEAR.values(), ids=UNCLEAR)
def test_what_can_be_read_in_two_ways_is_refused_with_its_values_and_the_flag(values, said):
    with pytest.raises(UnclearMask) as error:
        find_lesion_pixels(values)
    assert said in str(error.value) and "--mask_values" in str(error.value) and "\n" not in str(error.value)
