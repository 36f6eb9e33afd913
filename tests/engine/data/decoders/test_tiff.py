"""TIFF files of every depth, sign and order of bytes are read upright and whole, or refused in one line."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from engine.data.images import ImageError, decode_image, decode_stored

RAMP = np.arange(48).reshape(6, 8) * 100


def tiff(values: np.ndarray, **options) -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, values, **{"photometric": "minisblack", **options})
    return content.getvalue()


def shown(content: bytes) -> np.ndarray:
    """[H, W] of the first channel."""
    return np.asarray(decode_image(content, "x.tif"))[..., 0].astype(float)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["i1", "u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8"])
def test_the_values_of_every_type_are_kept(kind, order):
    values = (RAMP // 50 - 20 if kind == "i1" else RAMP + (2**31 if kind == "u4" else -300 if kind[0] in "if" else 0)).astype(kind)
    content = tiff(values, byteorder=order)
    stored = np.asarray(decode_stored(content, "x.tif"))
    assert np.array_equal(stored.astype(np.float64), values.astype(np.float64))
    low, high = (0, 2**14 - 1) if kind in ("u2", "u8") else (values.min(), values.max())
    if kind in ("u2", "u8"):
        high = next(2**bits - 1 for bits in (12, 14, 16) if values.max() < 2**bits)
    assert np.abs(shown(content) - (values.astype(float) - low) * (255 / (float(high) - low))).max() <= 0.51


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_colours_of_twelve_bits_are_as_bright_as_greys(options, planes, order):
    values = np.stack([RAMP * 4095 // 4700, RAMP // 2, RAMP // 4], -1).astype(np.uint16)
    values[-1, -1] = 4095
    arranged = values if planes == "contig" else np.moveaxis(values, -1, 0)
    content = tiff(arranged, photometric="rgb", planarconfig=planes, byteorder=order, **options)
    assert np.array_equal(decode_stored(content, "x.tif"), values)
    assert np.abs(np.asarray(decode_image(content, "x.tif")) - values * (255 / 4095)).max() <= 0.5


@pytest.mark.parametrize("predictor", [1, 2])
def test_lzw_is_read_without_another_package(predictor):
    """PIL packs the bytes as a grey image; the tags then say what they are."""
    random = np.random.default_rng(0)
    values = np.cumsum(random.integers(0, 3, (40, 30, 3)), axis=1).astype(np.uint16) * 40
    packed = values.copy()
    if predictor == 2:
        packed[:, 1:] -= values[:, :-1]
    grey = io.BytesIO()
    Image.fromarray(packed.view(np.uint8).reshape(40, -1)).save(grey, "TIFF", compression="tiff_lzw")
    with tifffile.TiffFile(io.BytesIO(grey.getvalue())) as file:
        page = file.pages.first
        strips = [grey.getvalue()[a : a + n] for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        rows = page.rowsperstrip
    entries = {256: (3, [30]), 257: (3, [40]), 258: (3, [16] * 3), 259: (3, [5]), 262: (3, [2]), 277: (3, [3]), 278: (3, [rows])}
    entries |= {317: (3, [predictor])}
    place, body, table = 8, b"", {}
    offsets = []
    for strip in strips:
        offsets.append(place + len(body))
        body += strip
    entries |= {273: (4, offsets), 279: (4, [len(strip) for strip in strips])}
    for tag, (kind, numbers) in sorted(entries.items()):
        content = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(content) > 4:
            content, start = struct.pack("<I", place + len(body)), content
            body += start
        table[tag] = struct.pack("<HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")
    folder = struct.pack("<H", len(table)) + b"".join(table.values()) + struct.pack("<I", 0)
    content = struct.pack("<2sHI", b"II", 42, place + len(body)) + body + folder
    assert np.array_equal(decode_stored(content, "x.tif"), values)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["u1", "u2", "f8"])
def test_every_orientation_is_applied_once(orientation, kind):
    """The same turns as PIL's, which reads 8 bits itself."""
    values = (RAMP % 251).astype(kind)
    exif = {3: np.rot90(values, 2), 6: np.rot90(values, -1), 8: np.rot90(values), 2: values[:, ::-1], 4: values[::-1]}
    exif |= {1: values, 5: values.T, 7: np.rot90(values, 2).T}
    content = tiff(values, extratags=[(274, 3, 1, orientation, True)])
    assert np.array_equal(np.asarray(decode_stored(content, "x.tif")), exif[orientation])


def test_white_may_be_zero():
    content = tiff(RAMP.astype(np.uint16), photometric="miniswhite")
    assert shown(content)[0, 0] == 255 and shown(content)[-1, -1] < 5


def test_big_tiff_alpha_and_more_channels_than_colours_are_read():
    grey = np.stack([RAMP // 20, RAMP * 0 + 255], -1).astype(np.uint8)
    assert np.array_equal(shown(tiff(grey, planarconfig="contig", extrasamples=[2])), grey[..., 0])
    assert np.array_equal(decode_stored(tiff(RAMP.astype(np.uint16), bigtiff=True), "x.tif"), RAMP)
    five = np.stack([RAMP // 20] * 5, -1).astype(np.uint8)
    assert np.asarray(decode_image(tiff(five, photometric="rgb"), "x.tif")).shape == (6, 8, 3)


@pytest.mark.parametrize(
    "values, options, said",
    [
        (np.zeros((6, 8, 5), np.uint8), {"planarconfig": "contig"}, "a TIFF of 5 channels, where grey or RGB is read"),
        (np.zeros((6, 8, 2), np.uint8), {"planarconfig": "contig"}, "a TIFF of 2 channels, where grey or RGB is read"),
        (np.zeros((3, 6, 8), np.uint8), {"planarconfig": "separate"}, "a TIFF of 3 channels, where grey or RGB is read"),
        (np.zeros((6, 8), np.complex64), {}, "a TIFF of 64 bits a value and sample format 6, which is not read"),
        (np.zeros((4, 16, 16), np.uint16), {"volumetric": True, "tile": (16, 16, 16)}, "a TIFF volume of "),
    ],
)
def test_what_is_no_image_is_one_line(values, options, said):
    with pytest.raises(ImageError) as error:
        decode_image(tiff(values, **options), "x.tif")
    assert str(error.value).startswith(f"x.tif: {said}") and "\n" not in str(error.value)
