"""An image_id's image and masks are told apart by what is in the files, not by the order of folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.masks.lesion_files import LesionFiles, looks_like_mask
from engine.data.rows import BadRow
from tests.engine.data.masks.shapes import A, B, encoded, painted

PHOTO = np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, content: bytes) -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return Path(name)


@pytest.mark.parametrize("masks", ["GroundTruth", "zz_masks"])
@pytest.mark.parametrize("content", [encoded(painted((A, 255))), encoded(painted((A, 255)), "JPEG")])
def test_masks_named_like_their_images_are_not_taken_for_them(masks, content):
    image, mask = write("images/ISIC_0.jpg", encoded(PHOTO, "JPEG")), write(f"{masks}/ISIC_0.png", content)
    assert LesionFiles([Path()]).find("ISIC_0") == (image, (mask,))
    assert LesionFiles([Path("images")], [Path(masks)]).find("ISIC_0") == (image, (mask,))
    assert LesionFiles([Path()], [Path(masks)]).find("ISIC_0") == (image, (mask,))


def test_the_same_image_twice_is_one():
    first = write("part_1/x.jpg", encoded(PHOTO, "JPEG"))
    write("part_2/x.jpg", encoded(PHOTO, "JPEG"))
    mask = write("masks/x_segmentation.png", encoded(painted((A, 255))))
    assert LesionFiles([Path()]).find("x") == (first, (mask,)) and LesionFiles([Path()]).find("y") == (None, ())


def test_two_images_or_two_masks_of_one_name_are_refused():
    write("a/x.jpg", encoded(PHOTO, "JPEG"))
    write("b/x.png", encoded(255 - PHOTO))
    with pytest.raises(BadRow, match="image 'x': a/x.jpg or b/x.png"):
        LesionFiles([Path()]).find("x")
    write("b/x.png", encoded(painted((A, 255))))
    write("c/x.png", encoded(painted((B, 255))))
    with pytest.raises(BadRow, match="mask 'x': b/x.png or c/x.png"):
        LesionFiles([Path()]).find("x")


def test_parts_of_a_mask_belong_together():
    image = write("x.jpg", encoded(PHOTO, "JPEG"))
    parts = [write(f"x_segmentation{number}.png", encoded(painted((A, 255)))) for number in ("", "_1")]
    assert LesionFiles([Path()]).find("x") == (image, tuple(parts))
    assert LesionFiles([Path()], [Path()]).find("x") == (image, tuple(parts))


def test_a_photograph_is_no_mask_and_a_mask_no_photograph():
    for pixels, is_mask in ((PHOTO, False), (painted(ground=7), False), (painted((A, 255)), True), (painted((A, 1)), True)):
        assert looks_like_mask(Image.fromarray(pixels).convert("RGB")) is is_mask
