"""TIFF files that PIL reads with a loss or not at all: deep ones of several channels, signed bytes, uint32, float64 and others.

The first page is read by `tifffile`. What it needs another package for, LZW, is unpacked by PIL strip by strip.
"""

import io
import logging
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from engine.errors import InputError

if TYPE_CHECKING:
    from tifffile import TiffPage

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MIN_IS_WHITE, MIN_IS_BLACK, RGB = 0, 1, 2  # photometric interpretations
LZW = 5
DEPTH = 32997  # the tag of volumes
KEPT = {(8, 1), (12, 1), (16, 1), (16, 2), (32, 2), (32, 3)}  # bits, sample format: 1 unsigned, 2 signed, 3 float


def pil_reads(tags: Any) -> bool:
    """Whether PIL keeps all values of the page with these tags (PIL's `tag_v2`)."""
    bits, samples, kind = max(tags.get(258, (1,))), tags.get(277, 1), tags.get(262)
    if tags.get(DEPTH, 1) != 1:
        return False
    if kind not in (MIN_IS_WHITE, MIN_IS_BLACK, RGB):
        return True  # palettes and colours that only PIL converts
    if samples == 1:
        return bits < 8 or (bits, tags.get(339, (1,))[0]) in KEPT and (bits == 8 or kind == MIN_IS_BLACK)
    return bits <= 8 and samples in (3, 4) and tags.get(339, (1,))[0] != 2


def read_tiff(data: bytes) -> np.ndarray:
    """[H, W] or [H, W, C] values of the first page, upright, 0 = black; C is 2 (grey, alpha), 3 or 4 (RGB, alpha).

    InputError where it has other channels; for damaged bytes all kinds of exceptions.
    """
    from tifffile import TiffFile  # imported here: most data sets hold no such file

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would print warnings of its own about damaged files
    with TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        if page.imagedepth != 1:
            raise InputError(f"a TIFF volume of {page.imagedepth} slices in one page, where a single image is read")
        if page.size > 8 * (Image.MAX_IMAGE_PIXELS or math.inf):  # twice what PIL has, in four channels
            raise InputError(f"{page.imagelength} x {page.imagewidth} pixels are more than an image may have")
        samples, extra = page.samplesperpixel, (*map(int, page.extrasamples or ()), 0)
        colour = int(page.photometric) == RGB
        if samples < 3 if colour else samples != 1 and (samples != 2 or extra[0] not in (1, 2)):
            raise InputError(f"a TIFF of {samples} channels, where grey or RGB is read, with or without alpha")
        values = _values(page, data)
        inverted, turned = int(page.photometric) == MIN_IS_WHITE, page.tags.valueof(274, 1)
    values = np.moveaxis(values[:, 0], 0, -2).reshape(*values.shape[2:4], samples)  # [S, 1, H, W, C], S or C being 1
    values = values[..., 0] if samples == 1 else values[..., : 3 + (extra[0] in (1, 2))] if colour else values
    if inverted:
        top = values.max() if values.dtype.kind == "f" else np.iinfo(values.dtype).max
        values = top - values
    return turn_upright(values, turned)


def count_pages(data: bytes) -> int:
    """Pages of the first one's size: others are thumbnails."""
    from tifffile import TiffFile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with TiffFile(io.BytesIO(data)) as file:
        first, seen, found = file.pages.first, set(), 0
        for page in file.pages:
            if page.offset in seen:  # damaged: its pages are a circle, round which tifffile would go for ever
                break
            seen.add(page.offset)
            found += page.shape == first.shape
        return found


def turn_upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, ...] by TIFF's and EXIF's orientation, 1 to 8 (TIFF 6.0, tag 274); others are as 1."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def _values(page: "TiffPage", data: bytes) -> np.ndarray:
    """[S, 1, H, W, C]: separate channels, rows, columns, channels side by side."""
    if page.dtype is None or page.dtype.kind not in "biuf":
        raise InputError(f"a TIFF of {page.bitspersample} bits a value and sample format {page.sampleformat}, which is not read")
    if int(page.compression) != LZW:
        return np.asarray(page.asarray(maxworkers=1)).reshape(page.shaped)
    page.compression = 1  # what is decoded below is not compressed any more
    values = np.zeros(page.shaped, page.dtype)
    for index, (start, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        _, _, shape = page.decode(None, index)
        whole = (1, page.tilelength, page.tilewidth, shape[-1]) if page.is_tiled else shape
        segment, (sample, _, row, column, _), shape = page.decode(_unpack(data[start : start + count], whole, page), index)
        part = np.asarray(segment)[:, : values.shape[2] - row, : values.shape[3] - column]
        values[sample, :, row : row + part.shape[1], column : column + part.shape[2]] = part
    return values


def _unpack(data: bytes, shape: tuple[int, ...], page: "TiffPage") -> bytes:
    """LZW -> bytes: PIL reads them as a grey image of one strip."""
    rows, columns = shape[1], math.prod(shape[2:]) * np.dtype(page.dtype).itemsize
    tags = (
        (256, columns),
        (257, rows),
        (258, 8),
        (259, LZW),
        (262, 1),
        (273, 8 + 2 + 9 * 12 + 4),
        (277, 1),
        (278, rows),
        (279, len(data)),
    )
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    strip = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + data
    with Image.open(io.BytesIO(strip), formats=["TIFF"]) as image:
        return image.tobytes()
