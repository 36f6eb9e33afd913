"""Colours, palettes and alpha channels show a lesion as grey levels do."""

import numpy as np
import pytest
from PIL import Image
from skimage import data

from engine.data.images import decode_stored
from engine.data.masks.colours import find_lesion
from engine.data.masks.levels import UnclearMask
from tests.engine.data.masks.shapes import AROUND, CORE, A, B, dice, encoded, painted, palette

RED, GREEN, BLUE, YELLOW, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0)
VOID = (224, 224, 192)


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([colours, alpha.astype(np.uint8)])


def jpeg(*parts, ground=0) -> bytes:
    return encoded(painted(*parts, ground=ground), "JPEG", quality=75)


def skin() -> np.ndarray:
    """[160, 200, 3] uint8: a brown mole, which the brightest channel hardly shows."""
    rows, columns = np.mgrid[:160, :200]
    mole = np.exp(-((rows - 90) ** 2 + (columns - 110) ** 2) / 400)[..., None]
    return (np.array([225, 170, 140]) * (1 - mole) + np.array([170, 90, 60]) * mole).astype(np.uint8)


CLEAR = {
    "red": (encoded(painted((A, RED))), A),
    "red and green apart": (encoded(painted((A, RED), (B, GREEN))), A | B),
    "white in RGB": (encoded(painted((A, WHITE))), A),
    "red with a white rim": (encoded(painted((AROUND, WHITE), (A, RED))), A),
    "PASCAL VOC's colours": (encoded(painted((AROUND, VOID), (A, (128, 0, 0)))), A),
    "red JPEG": (jpeg((A, RED)), A),
    "blue JPEG": (jpeg((A, BLUE)), A),
    "white JPEG in RGB": (jpeg((A, WHITE)), A),
    "two colours apart in a JPEG": (jpeg((A, RED), (B, BLUE)), A | B),
    "lossy WebP": (encoded(painted((A, WHITE)), "WEBP", quality=80), A),
    "GIF": (encoded(painted((A, 255)), "GIF"), A),
    "one bit": (encoded(Image.fromarray(A)), A),
    "fax": (encoded(Image.fromarray(A), "TIFF", compression="group4"), A),
    "palette": (encoded(palette(A + 2 * B, {1: RED, 2: YELLOW})), A | B),
    "palette without colours": (encoded(palette(A, {})), A),
    "palette of greys, white first": (encoded(palette(1 - A, {0: WHITE})), A),
    "palette, blue first and then black": (encoded(palette(1 - A, {0: BLUE})), A),
    "palette, background white": (encoded(palette(A, {0: WHITE, 1: RED})), A),
    "palette with a rim": (encoded(palette(np.where(A, 1, AROUND * 255), {1: (128, 0, 0), 255: VOID})), A),
    "palette, transparent": (encoded(palette(A, {0: WHITE, 1: RED}), transparency=0), A),
    "white, alpha shows it": (encoded(with_alpha(painted((A, WHITE), ground=255), A * 255)), A),
    "black, alpha shows it": (encoded(with_alpha(painted((A, BLACK)), A * 255)), A),
    "half transparent red": (encoded(with_alpha(painted((A, RED)), A * 128)), A),
    "red in transparent white": (encoded(with_alpha(painted((A, RED), ground=255), A * 255)), A),
    "alpha of nothing": (encoded(with_alpha(painted((A, RED)), A * 0)), A),
    "grey and alpha": (encoded(np.dstack([painted((A, 255)), painted(ground=255)])), A),
    "labels of 16 bits": (encoded(A.astype(np.uint16) * 300 + B.astype(np.uint16) * 301), A | B),
}


@pytest.mark.parametrize("content, meant", CLEAR.values(), ids=CLEAR)
def test_what_is_clear_is_read_as_it_is_meant(content, meant):
    assert dice(find_lesion(decode_stored(content, "mask")), meant) > 0.99


UNCLEAR = {
    "red on white": (encoded(painted((A, RED), ground=255)), "the colours 255/0/0 and 255/255/255 and no black"),
    "colours that touch": (encoded(painted((A, RED), (CORE, GREEN))), "the colours 0/0/0, 0/255/0 and 255/0/0"),
    "white beside red": (encoded(painted((A, WHITE), (B, RED))), "the colours 0/0/0, 255/0/0 and 255/255/255"),
    "colours that touch in a JPEG": (jpeg((A, RED), (CORE, GREEN)), "many colours, of which some touch"),
    "labels of a palette that touch": (encoded(palette(A + 1 * CORE, {1: RED, 2: YELLOW})), "the values 0, 1 and 2"),
    "two lesions": (encoded(with_alpha(painted((A, RED)), B * 255)), "its alpha channel and its colours show different lesions"),
    "a photograph": (encoded(data.astronaut()), "it has "),
    "a photograph of skin": (encoded(skin(), "JPEG"), "many colours and hardly any black"),
    "a photograph of noise": (encoded(np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)), "it has "),
}


@pytest.mark.parametrize("content, said", UNCLEAR.values(), ids=UNCLEAR)
def test_what_can_be_read_in_two_ways_is_refused(content, said):
    with pytest.raises(UnclearMask) as error:
        find_lesion(decode_stored(content, "mask"))
    assert said in str(error.value) and "--mask_values" in str(error.value) and "\n" not in str(error.value)
