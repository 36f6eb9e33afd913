"""Plain JPEG and PNG files decoded without Pillow: the same pixels, and whatever else a file says is left to it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.decoders.plain import read_plain
from engine.data.images import ImageError, decode_image

MINI = Path(__file__).resolve().parents[5] / "shared" / "data" / "mini" / "images"


def picture(mode="RGB", size=(61, 47)):
    """Gradients and noise, of odd sizes."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    noise = np.random.default_rng(0).integers(0, 40, (size[1], size[0], 4))
    return Image.fromarray((noise + np.stack([x, y, x + y, x], 2)).clip(0, 255).astype(np.uint8), "RGBA").convert(mode)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def with_chunk(png, kind, content):
    """The PNG with one more chunk after its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"quality": q, "subsampling": s, "progressive": s == 1} for q in (30, 92) for s in (0, 1, 2)])
def test_jpeg_has_pillows_pixels(mode, options):
    options = options if mode == "RGB" else {"quality": options["quality"]}
    data = saved(picture(mode), "JPEG", **options)
    np.testing.assert_array_equal(read_plain(data), by_pillow(data))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_png_has_pillows_pixels_and_is_not_corrected_for_gamma(mode):
    data = saved(picture(mode), "PNG")
    for png in (data, with_chunk(data, b"gAMA", struct.pack(">I", 100000)), with_chunk(data, b"pHYs", bytes(9))):
        np.testing.assert_array_equal(read_plain(png), by_pillow(png))


@pytest.mark.skipif(not MINI.is_dir(), reason="../shared/data/mini is not here")
def test_real_images_have_pillows_pixels():
    files = sorted(MINI.rglob("*.jpg"))
    assert len(files) == 145
    for file in files:
        np.testing.assert_array_equal(read_plain(file.read_bytes()), by_pillow(file.read_bytes()), err_msg=str(file))


def test_what_says_more_is_left_to_pillow():
    turned = Image.Exif()
    turned[274] = 6
    image, data = picture(), saved(picture(), "PNG")
    left = {
        "turned JPEG": saved(image, "JPEG", exif=turned),
        "turned PNG": saved(image, "PNG", exif=turned),
        "CMYK": saved(picture("CMYK"), "JPEG"),
        "palette": saved(image.quantize(), "PNG"),
        "alpha": saved(picture("RGBA"), "PNG"),
        "one bit": saved(picture("1"), "PNG"),
        "text": with_chunk(data, b"tEXt", b"Raw profile type exif\0"),
        "BMP": saved(image, "BMP"),
        "nothing": b"",
    }
    assert [name for name, content in left.items() if read_plain(content) is not None] == []
    assert decode_image(left["turned JPEG"], "x").size == (image.height, image.width)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cut_files_are_refused_as_pillow_refuses_them(kind):
    data = saved(picture(), kind)
    for length in (4, 20, 100, len(data) // 2, len(data) - 30):
        assert read_plain(data[:length]) is None
        with pytest.raises(ImageError):
            decode_image(data[:length], "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_of_a_changed_file_it_gives_what_pillow_gives_or_nothing(kind):
    data, generator, read = saved(picture(), kind), np.random.default_rng(0), 0
    for _ in range(300):
        changed = bytearray(data)
        for place in generator.integers(0, len(data), generator.integers(1, 4)):
            changed[place] = generator.integers(0, 256)
        pixels = read_plain(bytes(changed))
        if pixels is not None:
            read += 1
            np.testing.assert_array_equal(pixels, by_pillow(bytes(changed)))
    assert read or kind == "PNG"


def test_more_pixels_than_pillow_takes_without_a_word_are_left_to_it(monkeypatch):
    data = saved(picture(), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_plain(data) is None
