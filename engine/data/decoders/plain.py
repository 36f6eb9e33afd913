"""The two kinds of file that most sets consist of, by the fastest decoders there are: plain JPEG, and PNG of 8 bits.

simplejpeg (libjpeg-turbo) and pyspng (libspng) give exactly the pixels that Pillow gives. Most of a PNG's time is inflating, which
isal (ISA-L) does in half of it: libspng gets what came out, stored instead of deflated. A file that has anything else to say, an
orientation, transparency, a palette, frames, CMYK, or that is damaged or huge, is left to Pillow, which also says what is wrong.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pyspng
import simplejpeg
from isal import isal_zlib
from PIL import Image

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3}  # markers of a JPEG: how it is coded
SCAN, APP1 = 0xDA, 0xE1  # markers of a JPEG: its pixels begin; EXIF or XMP, which may say how it is to be turned
# Chunks of a PNG without which it has nothing to say but its pixels and their colours.
CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"hIST"}
IHDR, CHUNK, CHECKSUM, SEGMENT, BLOCK = map(struct.Struct, (">IIBBBBB", ">I4s", ">I", ">BBH", "<BHH"))
LONGEST = 0xFFFF  # bytes of a stored block
IEND = b"\0\0\0\0IEND\xaeB`\x82"


def read_plain(data: bytes) -> np.ndarray | None:
    """uint8 [H, W, 3], RGB; None where the file is of another kind, or Pillow has to look at it."""
    try:
        if data.startswith(JPEG):
            return _read_jpeg(data)
        return _read_png(data) if data.startswith(PNG) else None
    except (ValueError, RuntimeError, struct.error, isal_zlib.error):  # type: ignore[misc]  # which its stub calls an object
        return None


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of what `read_plain` would try to read, by its header: its pixels may be damaged. Else None."""
    try:
        if data.startswith(JPEG):
            return _jpeg_size(data)
        found = _png_parts(data) if data.startswith(PNG) else None
        return found[:2] if found else None
    except (ValueError, struct.error):
        return None


def _read_jpeg(data: bytes) -> np.ndarray | None:
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True) if _jpeg_size(data) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    if APP1 in jpeg_markers(data):
        return None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    return (height, width) if colours in ("Gray", "YCbCr") and not _too_large(height, width) else None


def jpeg_markers(data: bytes) -> Iterator[int]:
    """Of the segments up to the scan; ValueError or struct.error where one does not follow the other or says what none says."""
    place, marker = 2, 0
    while marker != SCAN:
        start, marker, length = SEGMENT.unpack_from(data, place)
        said = data[place + 4 : place + 16]
        unheard = marker in FRAMES and not b"\2" <= said[:1] <= b"\x10" or said[:5] == b"JFIF\0" and said[5:6] != b"\1"
        if start != 0xFF or unheard or said[:5] == b"Adobe" and said[11:] > b"\2":  # bits, version, how colours are turned
            raise ValueError("damaged JPEG")
        place += 1 if marker == 0xFF else 2 + length  # bytes that fill up
        yield marker


def _read_png(data: bytes) -> np.ndarray | None:
    found = _png_parts(data)
    if found is None:
        return None
    height, width, channels, deflated = found
    stored = _stored(b"".join(deflated), height * (1 + width * channels))
    if stored is None:
        return None
    checksum = CHECKSUM.pack(zlib.crc32(stored, zlib.crc32(b"IDAT")))
    pixels = pyspng.load(b"".join([data[: len(PNG) + 25], CHUNK.pack(len(stored), b"IDAT"), stored, checksum, IEND]))
    if pixels.shape == (height, width, 3):
        return pixels
    grey = pixels.reshape(height, width, 1)
    return np.repeat(grey, 3, axis=2)


def _png_parts(data: bytes) -> tuple[int, int, int, list[memoryview]] | None:
    """Height, width, channels, and what is compressed."""
    width, height, bits, colours, _, _, interlaced = IHDR.unpack_from(data, len(PNG) + CHUNK.size)
    if bits != 8 or colours not in (0, 2) or interlaced or _too_large(height, width):  # 0: grey, 2: RGB
        return None
    content, place, kind = memoryview(data), len(PNG), b""
    deflated = []
    while kind != b"IEND":
        length, kind = CHUNK.unpack_from(data, place)
        end = place + CHUNK.size + length
        (checksum,) = CHECKSUM.unpack_from(data, end)
        if kind not in CHUNKS or zlib.crc32(content[place + 4 : end]) != checksum:  # pyspng does not look at all of them
            return None
        if kind == b"IDAT":
            deflated.append(content[end - length : end])
        place = end + CHECKSUM.size
    return height, width, 3 if colours else 1, deflated


def _stored(deflated: bytes, size: int) -> bytes | None:
    """A zlib stream of `size` bytes with the same content and checksum, not compressed; None where it has another size."""
    stream = isal_zlib.decompressobj()
    content = memoryview(stream.decompress(deflated, size + 1))
    if len(content) != size or not stream.eof:
        return None
    parts: list[bytes | memoryview] = [b"\x78\x01"]
    for start in range(0, size, LONGEST):
        part = content[start : start + LONGEST]
        parts += [BLOCK.pack(start + LONGEST >= size, len(part), len(part) ^ LONGEST), part]
    end = len(deflated) - len(stream.unused_data)
    return b"".join([*parts, deflated[end - CHECKSUM.size : end]])


def _too_large(height: int, width: int) -> bool:
    """For Pillow to warn of, or to refuse."""
    return Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS
