"""`--mask_values` says what the lesion is, in words that are checked."""

import numpy as np
import pytest

from engine.data.images import decode_stored
from engine.data.masks.chosen import read_mask_values
from engine.data.masks.levels import UnclearMask
from engine.errors import InputError
from tests.engine.data.masks.shapes import CORE, A, B, dice, encoded, painted, palette

RED, GREEN = (255, 0, 0), (0, 255, 0)
NESTED = encoded(painted((A, 1), (CORE, 2)))
COLOURED = painted((A, RED), (CORE, GREEN))
CASES = {
    "1": (NESTED, A & ~CORE),
    "2": (NESTED, CORE),
    "1,2": (NESTED, A),
    "1-9": (NESTED, A),
    "nonzero": (NESTED, A),
    "0": (encoded(painted((A, 0), ground=255)), A),
    "1 ": (encoded(painted((A, 1), (B, 255))), A),
    "255": (encoded(painted((A, 255), (B, 1))), A),
    "128-255": (encoded(painted((A, 255), (B, 100)), "JPEG"), A),
    "300": (encoded(A.astype(np.uint16) * 300 + B.astype(np.uint16) * 301), A),
    "0/255/0": (encoded(COLOURED), CORE),
    "255/0/0, 0/255/0": (encoded(COLOURED), A),
    "255/0/0,0/255/0": (encoded(COLOURED, "JPEG", quality=95, subsampling=0), A),
    " nonzero": (encoded(COLOURED), A),
    "2 ": (encoded(palette(A + 1 * CORE, {1: RED, 2: GREEN})), CORE),
    "255/0/0": (encoded(palette(A + 1 * CORE, {1: RED, 2: GREEN})), A & ~CORE),
    "alpha": (encoded(np.dstack([painted((B, RED)), A.astype(np.uint8) * 255])), A),
}


@pytest.mark.parametrize("text", CASES)
def test_the_chosen_values_are_the_lesion(text):
    content, meant = CASES[text]
    assert dice(read_mask_values(text).select(decode_stored(content, "mask")), meant) > 0.95


def test_a_mask_without_the_chosen_values_is_empty():
    assert not read_mask_values("3").select(decode_stored(NESTED, "mask")).any()


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "5-2", "red", "1/2", "1,255/0/0", "nonzero,1", "1e9", "nan", "²"])
def test_words_that_mean_nothing_are_one_line(text):
    with pytest.raises(InputError) as error:
        read_mask_values(text)
    assert str(error.value) == (
        f"--mask_values {text}: expected values (1 or 1,2), ranges (128-255), colours (255/0/0), nonzero or alpha"
    )


def test_numbers_of_a_mask_in_colour_and_alpha_of_one_without_are_refused():
    for text, said in {"1": "it is in colour (0/0/0, 0/255/0 and 255/0/0)", "alpha": "it has no alpha channel"}.items():
        with pytest.raises(UnclearMask, match=said.replace("(", r"\(").replace(")", r"\)")):
            read_mask_values(text).select(decode_stored(encoded(COLOURED), "mask"))
