"""PNG files of 16 bits in several channels keep all of them, whatever their filters and order of lines."""

import struct
import zlib

import numpy as np
import pytest

from engine.data.decoders.deep_png import ADAM7, is_deep_png, read_deep_png
from engine.data.images import ImageError, decode_image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def predicted(kind: int, left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """PNG's filters 0 to 4 (RFC 2083, section 6), of all bytes of a line at once."""
    if kind == 4:
        away = [np.abs(left + above - corner - byte) for byte in (left, above, corner)]
        return np.where((away[0] <= away[1]) & (away[0] <= away[2]), left, np.where(away[1] <= away[2], above, corner))
    return (0 * left, left, above, (left + above) // 2)[kind]


def filtered(values: np.ndarray, kinds: list[int]) -> bytes:
    """[H, W, C] uint16 -> its lines, each by one of the filters."""
    rows, columns, channels = values.shape
    lines = values.astype(">u2").view(np.uint8).reshape(rows, -1).astype(int)
    above, content = np.zeros_like(lines[0]), b""
    for row, line in enumerate(lines):
        kind, nothing = kinds[row % len(kinds)], np.zeros(2 * channels, int)
        left, corner = (np.concatenate([nothing, part])[: len(line)] for part in (line, above))
        content += bytes([kind]) + ((line - predicted(kind, left, above, corner)) % 256).astype(np.uint8).tobytes()
        above = line
    return content


def png(values: np.ndarray, kinds: list[int], interlaced: bool = False) -> bytes:
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, interlaced)
    parts = [values[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [values]
    stream = zlib.compress(b"".join(filtered(part, kinds) for part in parts if part.size))
    chunks = [(b"IHDR", header), (b"IDAT", stream[:40]), (b"IDAT", stream[40:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("shape", [(21, 13), (1, 1), (3, 2), (2, 9)])
def test_all_bits_of_all_channels_are_read(channels, interlaced, shape):
    values = np.random.default_rng(0).integers(0, 2**16, (*shape, channels), dtype=np.uint16)
    content = png(values, [0, 1, 2, 3, 4], interlaced)
    assert is_deep_png(content) and np.array_equal(read_deep_png(content), values)


def test_twelve_bits_in_sixteen_are_as_bright_as_in_grey():
    ramp = np.linspace(0, 4095, 200).round().astype(np.uint16)
    for channels in (2, 3, 4):
        values = np.repeat(np.tile(ramp, (5, 1))[..., None], channels, axis=-1)
        values[..., -1] = 65535 if channels != 3 else values[..., -1]
        shown = np.asarray(decode_image(png(values, [1]), "x.png")).astype(float)
        assert np.abs(shown[..., 0] - ramp * (255 / 4095)).max() <= 0.5 and shown.max() == 255


def test_a_file_that_ends_early_is_damaged():
    content = png(np.random.default_rng(0).integers(0, 2**16, (30, 30, 3), dtype=np.uint16), [4])
    for cut in (20, 60, len(content) // 2, len(content) - 30):
        with pytest.raises(ImageError, match="x.png: truncated or damaged image"):
            decode_image(content[:cut], "x.png")
