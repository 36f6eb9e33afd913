"""PNG files of 16 bits and several channels (grey with alpha, RGB, RGBA), of which PIL keeps the upper eight bits.

PNG filters bytes against those one pixel before and one row above. A pixel's upper bytes therefore only ever meet upper bytes, and
lower ones lower ones: taken apart, each half is a PNG of 8 bits with the same filters, which PIL decodes.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {2: 3, 4: 2, 6: 4}  # colour type -> channels
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, step x, step y


def is_deep_png(data: bytes) -> bool:
    """Whether the header says 16 bits in more than one channel."""
    return (
        data[:8] == SIGNATURE and data[12:16] == b"IHDR" and data[24:25] == b"\x10" and data[25:26] in (b"\x02", b"\x04", b"\x06")
    )


def read_deep_png(data: bytes) -> np.ndarray:
    """[H, W, C] uint16. For bytes whose headers PIL has accepted; zlib.error, ValueError or OSError where they are damaged."""
    width, height, _, colour, *_, interlace = struct.unpack(">IIBBBBB", data[16:29])
    channels = CHANNELS[colour]
    passes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in ADAM7] if interlace else [(width, height)]
    passes = [(columns, rows) for columns, rows in passes if columns > 0 and rows > 0]
    size = sum(rows * (1 + 2 * channels * columns) for columns, rows in passes)
    stream = zlib.decompressobj().decompress(b"".join(_chunks(data, b"IDAT")), size)
    if len(stream) < size:
        raise ValueError("image file is truncated")
    halves: tuple[list[bytes], list[bytes]] = ([], [])
    start = 0
    for columns, rows in passes:
        end = start + rows * (1 + 2 * channels * columns)
        lines = np.frombuffer(stream[start:end], np.uint8).reshape(rows, -1)
        for half, kept in enumerate(halves):
            kept.append(np.concatenate([lines[:, :1], lines[:, 1 + half :: 2]], axis=1).tobytes())
        start = end
    header = data[16:24] + b"\x08" + data[25:29]
    upper, lower = (_decode(header, b"".join(half)) for half in halves)
    return (upper.astype(np.uint16) << 8 | lower).reshape(height, width, channels)


def _chunks(data: bytes, kind: bytes) -> list[bytes]:
    found, place = [], len(SIGNATURE)
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == kind:
            found.append(data[place + 8 : place + 8 + length])
        place += 12 + length
    return found


def _decode(header: bytes, stream: bytes) -> np.ndarray:
    """A PNG of 8 bits made of its header and its filtered lines, decoded."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(stream, 0)), (b"IEND", b""))
    png = b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    with Image.open(io.BytesIO(SIGNATURE + png), formats=["PNG"]) as image:
        return np.asarray(image)
