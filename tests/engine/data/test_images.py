"""Image files open as the RGB that a radiologist's screen would show, or say in one line why not."""

import io
import os
import struct
import zlib
from functools import cache

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from pydicom import dcmread
from pydicom.data import get_testdata_file

from engine.data.images import TURNS, ImageError, decode_image, decode_stored, is_turned, open_image, write_upright
from tests.fuzz import bounded


def gradient(size: int = 32) -> np.ndarray:
    return np.add.outer(np.arange(size), np.arange(size)).astype(np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "b.tif", "b.TIFF", "c.bmp", "c.BMP"])
def test_lossless_kinds_give_their_pixels(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "b.jpeg", "jpeg-without-suffix"])
def test_jpeg_opens_by_its_content(tmp_path, name):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / name, format="JPEG")
    image = open_image(tmp_path / name)
    assert image.size == (40, 30) and np.abs(np.asarray(image)[15, 20].astype(int) - (200, 30, 30)).max() < 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_pil_mode_becomes_rgb(tmp_path, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(tmp_path / name)
    assert (np.asarray(open_image(tmp_path / name)) == 255).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
@pytest.mark.parametrize("bits", [12, 16])
def test_deep_grey_is_scaled_from_the_bits_it_uses(tmp_path, name, bits):
    top = 2**bits - 1
    values = (np.linspace(0, top, 64).reshape(8, 8)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    pixels = np.asarray(open_image(tmp_path / name)).astype(float)
    assert np.abs(pixels[..., 0] - values * (255 / top)).max() <= 0.5 and (pixels[..., 0] == pixels[..., 2]).all()


def test_float_tiff_is_scaled_from_its_own_range(tmp_path):
    values = gradient().astype(np.float32) - 20
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "f.tif")
    pixels = np.asarray(open_image(tmp_path / "f.tif"))
    assert pixels[0, 1, 0] == 0 and pixels[-1, -1, 0] == 255


def picture() -> Image.Image:
    """[20, 30] RGB, smooth, and different in all four corners."""
    y, x = np.mgrid[:20, :30]
    return Image.fromarray(np.stack([8 * x, 12 * y, 4 * x + 4 * y], -1).astype(np.uint8))


def turned(orientation: int, kind: str) -> bytes:
    """The picture as a camera stores it that was held otherwise, in a file that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    image = picture() if orientation == 1 else picture().transpose(TURNS[back])
    content = io.BytesIO()
    image.save(content, kind, exif=exif, **({"quality": 98} if kind in ("JPEG", "WEBP") else {}))
    return content.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_in_every_format(tmp_path, kind, orientation):
    content = turned(orientation, kind)
    for image in (decode_image(content, "x"), decode_stored(content, "x")):
        away = np.abs(np.asarray(image).astype(int) - np.asarray(picture()))
        assert image.size == (30, 20) and away.mean() < 4
    if kind != "TIFF":
        assert is_turned(content) is (orientation != 1)
    (tmp_path / "x").write_bytes(content)
    for name in ("y.jpg", "y.png"):
        write_upright(tmp_path / "x", tmp_path / name)
        with Image.open(tmp_path / name) as stored:  # as those read it who do not know of orientations
            assert np.abs(np.asarray(stored.convert("RGB")).astype(int) - np.asarray(picture())).mean() < 4


def test_an_upright_image_is_copied_as_it_is(tmp_path):
    (tmp_path / "x.jpg").write_bytes(turned(1, "JPEG"))
    write_upright(tmp_path / "x.jpg", tmp_path / "y.jpg")
    assert (tmp_path / "y.jpg").read_bytes() == turned(1, "JPEG")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"]
)
def test_damaged_or_unknown_orientations_leave_the_image_as_it_is(exif):
    content = io.BytesIO()
    picture().save(content, "JPEG", quality=98, exif=exif)
    assert decode_image(content.getvalue(), "x").size == (30, 20) and not is_turned(content.getvalue())


def test_pipes_and_giants_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "giant.png", "wb") as file:
        file.truncate(2**31)
    for name, said in {"pipe.png": "a named pipe, not a file", "giant.png": "2,147,483,648 bytes"}.items():
        with pytest.raises(ImageError, match=f"{name}: cannot be read: {said}"):
            open_image(tmp_path / name)


def window_of(name: str, low: float, high: float) -> np.ndarray:
    """The display pipeline of a monochrome DICOM written out: rescale, clip to the window, scale to 0-255."""
    dataset = dcmread(get_testdata_file(name))
    values = dataset.pixel_array * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    return np.clip((values - low) / (high - low) * 255, 0, 255)


def test_ct_is_windowed_in_hounsfield_units():
    dataset = dcmread(get_testdata_file("693_UNCR.dcm"))
    centre, width = float(dataset.WindowCenter) - 0.5, float(dataset.WindowWidth) - 1  # DICOM PS3.3 C.11.2.1.2.1
    pixels = np.asarray(open_image(get_testdata_file("693_UNCR.dcm")))[..., 0]
    assert np.abs(pixels - window_of("693_UNCR.dcm", centre - width / 2, centre + width / 2)).max() <= 0.5


def test_ct_without_window_uses_its_range_without_the_padding():
    dataset = dcmread(get_testdata_file("CT_small.dcm"))
    inside = dataset.pixel_array[dataset.pixel_array != dataset.PixelPaddingValue] + float(dataset.RescaleIntercept)
    pixels = np.asarray(open_image(get_testdata_file("CT_small.dcm")))[..., 0]
    assert np.abs(pixels - window_of("CT_small.dcm", inside.min(), inside.max())).max() <= 0.5


def test_monochrome1_is_inverted():
    dataset = dcmread(get_testdata_file("RG3_UNCR.dcm"))
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    pixels = np.asarray(open_image(get_testdata_file("RG3_UNCR.dcm")))[..., 0]
    stored = dataset.pixel_array
    assert pixels[stored == stored.min()].mean() > 200 and pixels[stored == stored.max()].mean() < 60


def test_colour_dicoms_give_their_colours():
    rgb = np.asarray(open_image(get_testdata_file("US1_UNCR.dcm")))
    assert np.array_equal(rgb, dcmread(get_testdata_file("US1_UNCR.dcm")).pixel_array)
    reference = np.asarray(open_image(get_testdata_file("SC_rgb.dcm"))).astype(int)
    for name in ("SC_ybr_full_uncompressed.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_16bit.dcm"):
        assert np.abs(np.asarray(open_image(get_testdata_file(name))) - reference).mean() < 3, name
    palette = np.asarray(open_image(get_testdata_file("examples_palette.dcm")))
    assert palette.max() > 200 and (palette[..., 0] != palette[..., 2]).any()


def test_multi_frame_dicom_gives_its_middle_frame():
    path = get_testdata_file("emri_small.dcm")
    frames = dcmread(path).pixel_array
    middle = frames[len(frames) // 2].astype(float)
    expected = (middle - middle.min()) / (middle.max() - middle.min()) * 255
    assert len(frames) == 10 and np.abs(np.asarray(open_image(path))[..., 0] - expected).max() <= 0.5


def test_dicom_is_known_by_its_preamble(tmp_path):
    source = get_testdata_file("MR_small.dcm")
    (tmp_path / "IM0001").write_bytes(open(source, "rb").read())
    assert np.array_equal(np.asarray(open_image(tmp_path / "IM0001")), np.asarray(open_image(source)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL says so on the way to its error
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.001, 0.5, 0.95])
def test_truncated_files_are_errors(tmp_path, kind, kept):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, kind)
    (tmp_path / "cut").write_bytes(whole.getvalue()[: int(kept * len(whole.getvalue()))])
    with pytest.raises(ImageError, match="cut: truncated or damaged image: ") as error:
        open_image(tmp_path / "cut")
    assert "\n" not in str(error.value) and not ImageFile.LOAD_TRUNCATED_IMAGES


def test_damaged_dicoms_are_errors(tmp_path):
    with pytest.raises(ImageError, match="truncated or damaged image: The number of bytes of pixel data is less than expected"):
        open_image(get_testdata_file("MR_truncated.dcm"))
    with pytest.raises(ImageError, match="a DICOM file without an image"):
        open_image(get_testdata_file("rtplan.dcm"))
    (tmp_path / "noise.dcm").write_bytes(np.random.default_rng(2).bytes(5000))
    with pytest.raises(ImageError, match="noise.dcm: "):
        open_image(tmp_path / "noise.dcm")


def test_other_unusable_files_are_errors(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, reason in {
        "gone.png": "no such image file",
        "empty.png": "the file is empty",
        "text.png": "not an image of a known kind",
        "page.png": "not an image of a known kind",  # PIL would have started Ghostscript
        "a\0b.png": "cannot be read: no file can have this name",
    }.items():
        with pytest.raises(ImageError) as error:
            open_image(f"{tmp_path}/{name}")
        assert str(error.value) == f"{tmp_path}/{name}: {reason} (expected a whole PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM file)"


def test_decompression_bombs_are_errors(tmp_path, monkeypatch):
    Image.new("L", (300, 300)).save(tmp_path / "big.png")
    dicom = get_testdata_file("CT_small.dcm")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    for path in (tmp_path / "big.png", dicom):
        with pytest.raises(ImageError, match="exceeds limit|more than an image may have"):
            open_image(path)


def test_the_error_survives_a_data_loaders_worker():
    error = ImageError("a.png: no such image file")  # what a worker's wrapper builds it from
    assert str(error) == "a.png: no such image file" and error.reason == ""


@cache
def whole_files() -> list[bytes]:
    """Small images of every kind that is read."""
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 500
    small = picture().resize((9, 7))
    files = [(small.convert(mode), kind, {}) for mode in ("L", "P", "RGB") for kind in ("PNG", "TIFF", "BMP", "GIF")]
    files += [(small, kind, {}) for kind in ("JPEG", "WEBP")] + [(Image.fromarray(deep), kind, {}) for kind in ("PNG", "TIFF")]
    files += [(small, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    contents = []
    for image, kind, options in files:
        content = io.BytesIO()
        image.save(content, kind, **options)
        contents.append(content.getvalue())
    for values, options in ((np.stack([deep] * 3, -1), {"photometric": "rgb"}), (deep.astype(float), {"compression": "zlib"})):
        content = io.BytesIO()
        tifffile.imwrite(content, values, **options)
        contents.append(content.getvalue())
    lines = b"".join(b"\1" + bytes(range(48)) for _ in range(8))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    parts = (struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in chunks)
    contents.append(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    dataset = dcmread(get_testdata_file("MR_small.dcm"))
    dataset.Rows = dataset.Columns = 4
    dataset.PixelData = dataset.PixelData[:32]
    content = io.BytesIO()
    dataset.save_as(content)
    return [*contents, content.getvalue()]


@pytest.fixture
def few_pixels(monkeypatch):
    """A changed header may ask for the memory of the largest image allowed."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)


@pytest.mark.filterwarnings("ignore")  # of decoders, about what is damaged
@bounded(2000)
@given(st.integers(0, 2**32))
def test_fuzz_of_damaged_images(few_pixels, seed):
    """Whatever bytes are cut or changed: an image, or one line."""
    random = np.random.default_rng(seed)
    content = bytearray(whole_files()[seed % len(whole_files())])
    for place in random.integers(0, len(content) if seed % 3 else min(60, len(content)), random.integers(0, 5)):
        content[place] = random.integers(0, 256)
    content = bytes(content[: random.integers(0, len(content))] if random.random() < 0.3 else content)
    try:
        image = (decode_image, decode_stored)[seed // 7 % 2](content, "x")
    except ImageError as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)
        return
    assert np.asarray(image).size > 0
