"""Image files open as the RGB that a radiologist's screen would show, or say in one line why not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile
from pydicom import dcmread
from pydicom.data import get_testdata_file

from engine.data.images import ImageError, open_image


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
        ".": "cannot be read: a folder, not a file",
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
