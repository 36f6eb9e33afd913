"""An image and its mask open together, whatever the mask's files hold."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

from engine.data.images import ImageError
from engine.data.masks.chosen import read_mask_values
from engine.data.masks.colours import find_lesion
from engine.data.masks.levels import UnclearMask
from engine.data.masks.pair import ImageAndMask, decode_mask, is_plain_mask, open_mask, read_mask
from engine.errors import InputError
from tests.engine.data.masks.shapes import CORE, A, B, encoded, painted
from tests.fuzz import bounded


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An image, and masks of A and B."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(painted((A, (200, 30, 30)))).save("x.png")
    write("x_mask.png", encoded(painted((A, 255))))
    write("x_mask_1.png", encoded(painted((B, 1))))
    write("nested.png", encoded(painted((A, 1), (CORE, 2))))


def write(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)


def opened(*masks: str, mask_values: str | None = None) -> np.ndarray:
    image, mask = ImageAndMask(Path("x.png"), Path(masks[0]), tuple(map(Path, masks[1:])), mask_values).open()
    assert image.size == mask.size and mask.mode == "L" and set(np.unique(mask)) <= {0, 255}
    return np.asarray(mask) > 0


def test_masks_in_several_files_are_united():
    assert np.array_equal(opened("x_mask.png"), A) and np.array_equal(opened("x_mask.png", "x_mask_1.png"), A | B)
    Image.fromarray(painted((B, 255))).resize((400, 320)).save("large.png")
    united = opened("x_mask.png", "large.png")
    assert united[A].all() and abs(int(united.sum()) - int((A | B).sum())) < 20


def test_an_unclear_mask_is_one_line_and_the_flag_decides():
    with pytest.raises(ImageError) as error:
        opened("x_mask.png", "nested.png")
    assert "mask 'nested.png': it has the values 0, 1 and 2, which can be read in more than one way: --mask_values says" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    assert np.array_equal(opened("nested.png", mask_values="2"), CORE)
    assert np.array_equal(read_mask("nested.png", Image.open("x.png"), "1"), A & ~CORE)
    with pytest.raises(InputError, match="--mask_values x: expected values"):
        opened("x_mask.png", mask_values="x")


def test_the_key_and_the_stamp_tell_every_file_and_the_flag():
    """What was checked once is not checked again until one of them changes."""
    pair = ImageAndMask(Path("x.png"), Path("x_mask.png"))
    others = [replace(pair, more_masks=(Path("x_mask_1.png"),)), replace(pair, mask_values="1")]
    assert len({pair.key, *(other.key for other in others)}) == 3 and len(others[0].stamp()) == 6


def test_a_mask_is_upright_as_its_image_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(painted((A, 255))).transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    assert np.array_equal(opened("turned.png"), A)
    assert not is_plain_mask(Path("turned.png"), open_mask(Path("turned.png")))
    assert is_plain_mask(Path("x_mask.png"), open_mask(Path("x_mask.png")))


def test_masks_of_another_shape_and_files_that_are_none_are_one_line():
    Image.fromarray(painted((A, 255))).resize((160, 160)).save("square.png")
    write("text.png", b"no image")
    for mask, said in {
        "square.png": "mask 'square.png' is 160 x 160, its image 200 x 160",
        "text.png": "mask 'text.png': not an image of a known kind",
        "gone.png": "mask 'gone.png': no such image file",
    }.items():
        with pytest.raises(ImageError, match=re.escape(said)):
            opened(mask)
    with pytest.raises(InputError, match="square.png: the mask is 160 x 160, the image 200 x 160"):
        read_mask("square.png", Image.open("x.png"))


def test_pages_are_not_left_out_unseen():
    """A second page, frame or segment may be another lesion; thumbnails are none."""
    pages = [Image.fromarray(painted((part, 255))) for part in (A, B)]
    whole = {kind: encoded(pages[0], kind, save_all=True, append_images=pages[1:]) for kind in ("TIFF", "GIF", "PNG", "WEBP")}
    deep, mixed = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(deep, np.stack([A, B]).astype(np.uint32), photometric="minisblack")
    for content in [*whole.values(), deep.getvalue()]:
        with pytest.raises(
            ImageError, match="it has 2 pages, where one is read: save each as a mask of its own .expected a mask of"
        ):
            decode_mask(content, "mask")
    with tifffile.TiffWriter(mixed) as file:
        file.write(painted((A, 255)))
        file.write(painted((A, 255))[::4, ::4], subfiletype=1)
    assert np.array_equal(np.asarray(decode_mask(mixed.getvalue(), "mask")) > 0, A)
    segments = Path(get_testdata_file("liver.dcm")).read_bytes()
    with pytest.raises(ImageError, match="a DICOM segmentation of 3 frames, where one is read"):
        decode_mask(segments, "liver.dcm")


KINDS = {  # mode -> formats that hold it
    "1": ["PNG", "TIFF", "BMP"],
    "L": ["PNG", "TIFF", "BMP", "JPEG", "GIF", "WEBP"],
    "LA": ["PNG", "TIFF"],
    "P": ["PNG", "TIFF", "BMP", "GIF"],
    "RGB": ["PNG", "TIFF", "BMP", "JPEG", "WEBP"],
    "RGBA": ["PNG", "TIFF", "WEBP"],
    "I;16": ["PNG", "TIFF"],
    "I": ["TIFF"],
    "F": ["TIFF"],
}
FILES = [(mode, kind) for mode, kinds in KINDS.items() for kind in kinds]
LEVELS = [0, 1, 2, 3, 127, 128, 200, 254, 255, 300, 65535]
CHOICES = [None, None, None, "1", "0", "1,2", "128-255", "nonzero", "255/0/0", "alpha"]
DEEP = {"I;16": np.uint16, "I": np.int32, "F": np.float32}


def random_mask(mode: str, seed: int) -> Image.Image:
    """Few random values, or many, in random blocks."""
    random = np.random.default_rng(seed)
    height, width, step = random.integers(1, 7, 3)
    levels = random.choice(LEVELS, random.integers(1, 5)) if seed % 4 else random.integers(0, 256, 40)
    channels = {"LA": 2, "RGB": 3, "RGBA": 4}.get(mode, 1)
    values = random.choice(levels, (height, width, channels)).repeat(step, 0).repeat(step, 1)
    values = values if channels > 1 else values[..., 0]
    if mode in DEEP:
        return Image.fromarray(values.astype(DEEP[mode]))
    if mode == "1":
        return Image.fromarray(values > 1)
    image = Image.fromarray((values % 256).astype(np.uint8))
    if mode == "P":
        image.putpalette(random.choice([0, 0, 1, 128, 255], 3 * random.integers(1, 257)).astype(np.uint8).tobytes())
    return image


@bounded(8000)
@given(st.integers(0, 2**32))
def test_fuzz_of_the_values_of_masks(seed):
    """What is accepted has the mask's size and two values; all else is one line."""
    image = random_mask(list(KINDS)[seed % len(KINDS)], seed)
    mask_values = CHOICES[seed // len(KINDS) % len(CHOICES)]
    try:
        mask = find_lesion(stored(image)) if mask_values is None else read_mask_values(mask_values).select(stored(image))
    except UnclearMask as error:
        assert "\n" not in str(error) and "--mask_values" in str(error)
        return
    assert mask.dtype == bool and mask.shape == image.size[::-1]


def stored(image: Image.Image) -> Image.Image | np.ndarray:
    return np.asarray(image) if image.mode in DEEP else image


@bounded(2000)
@given(st.integers(0, 2**32))
def test_fuzz_of_mask_files(seed):
    mode, kind = FILES[seed % len(FILES)]
    image = random_mask(mode, seed)
    try:
        mask = decode_mask(encoded(image, kind), "mask")
    except ImageError as error:
        assert "\n" not in str(error) and "--mask_values" in str(error)
        return
    assert mask.mode == "L" and mask.size == image.size and {level for _, level in mask.getcolors()} <= {0, 255}
