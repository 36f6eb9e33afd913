"""The masks of an image are found by their names, whatever ending they have."""

import re
from pathlib import Path

import pytest

from engine.data.masks.names import WORDS, MaskNames, bare_name, split_name
from engine.errors import InputError


def names(*files: str) -> MaskNames:
    return MaskNames((bare_name(Path(file), Path()), Path(file)) for file in files)


@pytest.mark.parametrize("word", [*WORDS, "Segmentation", "MASK"])
@pytest.mark.parametrize("pattern", ["x_{}.png", "x-{}.bmp", "x.{}.tif", "x {}.png", "x_{}_1.png", "x_{}2.png"])
def test_every_known_ending_is_a_mask_of_the_image(word, pattern):
    file = pattern.format(word)
    assert names("x.png", file).masks_of("x", in_one_folder=True) == (Path(file),)
    assert names(file).masks_of("x") == (Path(file),) and names("x.png", file).is_mask(bare_name(Path(file), Path()))


def test_numbered_masks_are_parts_of_one_in_the_order_of_their_numbers():
    found = names(*(f"benign (1)_mask{number}.png" for number in ("_10", "", "_2", "_1")), "benign (10)_mask.png")
    assert [path.name for path in found.masks_of("benign (1)")] == [
        "benign (1)_mask.png",
        "benign (1)_mask_1.png",
        "benign (1)_mask_2.png",
        "benign (1)_mask_10.png",
    ]
    assert found.parts_of(Path("benign (1)_mask_2.png")) == found.masks_of("benign (1)")
    assert found.parts_of(Path("benign (10)_mask.png")) == (Path("benign (10)_mask.png"),)


def test_a_mask_of_the_images_own_name_is_one_in_another_folder_only():
    assert names("x.png").masks_of("x") == (Path("x.png"),) and names("x.png").masks_of("x", in_one_folder=True) == ()
    assert names("a/x.png").masks_of("x") == () and names("a/x_mask.png").masks_of("a/x") == (Path("a/x_mask.png"),)


def test_of_files_that_differ_in_their_suffix_the_images_is_taken_and_else_none():
    assert names("x.png", "x.tif").masks_of("x", ".tif") == (Path("x.tif"),)
    for files in (("x.png", "x.tif"), ("x_mask.png", "x_seg.png"), ("x.png", "x_mask.png"), ("x_mask.png", "x_mask.bmp")):
        with pytest.raises(InputError, match=re.escape(f"{files[0]} and {files[1]} could each be the mask of 'x'")):
            names(*files).masks_of("x", ".jpg")


@pytest.mark.parametrize("name", ["x", "mask", "_mask", "xmask", "x_mask_", "x_mask_a", "unmasked", "x_mask_12345", ""])
def test_other_names_are_no_masks_of_another_image(name):
    assert split_name(name) is None
