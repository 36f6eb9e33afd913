"""Arrays as nnInteractive's clients send and take them: a header, then chunks that blosc2 packed.

"NNIA", version, codec, number of dimensions, length of the type's name (a byte each), the name, shape (int64 each),
number of chunks (uint32), and of each chunk: its size unpacked and packed (uint64 each), and its bytes; little-endian
"""

import math
import struct

import numpy as np

MAGIC, VERSION, CODECS = b"NNIA", 1, {1: "ZSTD", 2: "LZ4"}
TYPES = frozenset("bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split())
FORMATS, LAST_FILTER = (0, 1, 4), 2  # in a chunk's header: stored, LZ4, ZSTD; up to bitshuffle
CHUNK = 2**30  # blosc2 counts a call's bytes in 32 bits


def pack_array(array: np.ndarray) -> bytes:
    """The array, of one of TYPES, as the clients read it."""
    import blosc2

    name, array = array.dtype.name.encode(), np.ascontiguousarray(array)
    raw = array.reshape(-1).view(np.uint8).data
    pieces = [raw[start : start + CHUNK] for start in range(0, len(raw), CHUNK)]
    head = MAGIC + bytes([VERSION, 1, array.ndim, len(name)]) + name + struct.pack(f"<{array.ndim}qI", *array.shape, len(pieces))
    packed = [head]
    for piece in pieces:
        # The item's size: blosc2 cannot read back zeros whose length is no multiple of it.
        chunk = blosc2.compress2(
            piece, codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.NOFILTER], typesize=array.itemsize, nthreads=1
        )
        packed += [struct.pack("<QQ", len(piece), len(chunk)), chunk]
    return b"".join(packed)


def unpack_array(packed: bytes, most_bytes: int) -> np.ndarray:
    """What was packed. ValueError with one line for anything else, and where the array would hold more than `most_bytes`."""
    try:
        return _unpack(memoryview(packed), most_bytes)
    except struct.error:
        raise ValueError("the packed array is cut short") from None


def _unpack(packed: memoryview, most_bytes: int) -> np.ndarray:
    magic, version, codec, num_dims, name_length = struct.unpack_from("<4sBBBB", packed)
    if magic != MAGIC or version != VERSION or codec not in CODECS:
        raise ValueError("not a packed array (expected NNIA, version 1, packed with ZSTD or LZ4)")
    name = bytes(packed[8 : 8 + name_length]).decode("latin-1")
    if name not in TYPES:
        raise ValueError(f"an array of {ascii(name)[:40]} (expected bool, or integers or floats of up to 64 bits)")
    place = 8 + name_length
    *shape, num_chunks = struct.unpack_from(f"<{num_dims}qI", packed, place)
    place += 8 * num_dims + 4
    dtype = np.dtype("uint8" if name == "bool" else name)
    if not 1 <= num_dims <= 4 or min(shape) < 1:
        raise ValueError(f"an array of shape {shape} (expected one to four dimensions, none of them empty)"[:200])
    size = math.prod(shape) * dtype.itemsize
    if size > most_bytes:
        raise ValueError(f"an array of {size:,} bytes (expected at most {most_bytes:,})")
    flat = np.empty(size, np.uint8)
    written = 0
    for _ in range(num_chunks):
        length, packed_length = struct.unpack_from("<QQ", packed, place)
        place += 16
        _unpack_chunk(packed[place : place + packed_length], flat[written : written + length], length, packed_length)
        place, written = place + packed_length, written + length
    if written != size or place != len(packed):
        raise ValueError(f"the chunks hold {written:,} bytes (expected {size:,}, and nothing behind them)")
    array = flat.view(dtype).reshape(shape)
    return array != 0 if name == "bool" else array


def _unpack_chunk(chunk: memoryview, into: np.ndarray, length: int, packed_length: int) -> None:
    """The lengths are what the array's header says; blosc2's own of 32 bytes must say the same."""
    import blosc2

    sizes = blosc2.get_cbuffer_sizes(chunk) if len(chunk) >= 32 else ()
    if not 0 < length == len(into) or tuple(sizes[:2]) != (length, len(chunk)) or packed_length != len(chunk):
        raise ValueError("a chunk is not as long as its header says")
    if chunk[2] >> 5 not in FORMATS or max(chunk[16:22]) > LAST_FILTER:  # others are plug-ins, which blosc2 would look for
        raise ValueError("a chunk is not packed with ZSTD or LZ4")
    try:
        blosc2.decompress2(chunk, dst=into, nthreads=1)
    except (ValueError, RuntimeError):
        raise ValueError("a chunk cannot be unpacked") from None
