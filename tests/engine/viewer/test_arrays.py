"""Packed arrays: what the client packs is read, what we pack it reads, and what is damaged is refused before it takes memory."""

import struct
import tracemalloc

import blosc2
import numpy as np
import pytest
from nnInteractive.inference.remote import serialization

from engine.viewer.arrays import TYPES, pack_array, unpack_array

PACKED = serialization.pack_array(np.arange(60, dtype=np.int16).reshape(1, 3, 4, 5))
CHUNK = 8 + len("int16") + 4 * 8 + 4 + 16  # where the first chunk begins


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_both_ways_agree_with_the_client(dtype):
    for shape in ((1, 7, 8, 9), (3,), (1, 1, 1, 1)):
        for array in ((np.random.default_rng(0).random(shape) * 100).astype(dtype), np.zeros(shape, dtype)):
            read = [unpack_array(serialization.pack_array(array, codec=codec), array.nbytes) for codec in serialization._CODEC_ID]
            for again in [*read, serialization.unpack_array(pack_array(array))]:
                assert again.dtype == array.dtype and (again == array).all()


def changed(place, value):
    return PACKED[:place] + bytes([value]) + PACKED[place + 1 :]


def of_shape(*shape, name=b"uint8"):
    return struct.pack(f"<4sBBBB{len(name)}s{len(shape)}qI", b"NNIA", 1, 1, len(shape), len(name), name, *shape, 0)


@pytest.mark.parametrize(
    "packed, message",
    [
        (b"NNI", "is cut short"),
        (PACKED[:40], "is cut short"),
        (changed(0, ord("M")), "not a packed array"),
        (changed(5, 9), "not a packed array"),
        (of_shape(3, name=b"object"), "an array of 'object' (expected bool, or integers or floats"),
        (of_shape(2**40, 2**40, 2**40), "bytes (expected at most 1,000)"),
        (of_shape(-3, -4), "an array of shape [-3, -4] (expected one to four dimensions, none of them empty)"),
        (of_shape(), "expected one to four dimensions"),
        (PACKED + b"x", "hold 120 bytes (expected 120, and nothing behind them)"),
        (PACKED[:-1], "not as long as its header says"),
        (changed(CHUNK - 16, 119), "not as long as its header says"),
        (changed(CHUNK + 4, 119), "not as long as its header says"),
        (changed(CHUNK + 2, 0xC7), "not packed with ZSTD or LZ4"),
        (changed(CHUNK + 16, 35), "not packed with ZSTD or LZ4"),
    ],
)
def test_what_is_damaged_or_too_large_is_refused(packed, message):
    with pytest.raises(ValueError) as error:
        unpack_array(packed, 1000)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_bomb_takes_no_memory():
    bomb = serialization.pack_array(np.zeros((1, 100, 1000, 1000), np.uint8), filters=[blosc2.Filter.NOFILTER])
    tracemalloc.start()
    with pytest.raises(ValueError, match="an array of 100,000,000 bytes"):
        unpack_array(bomb, 10_000_000)
    assert len(bomb) < 200 and tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_fuzzed_arrays_are_read_or_refused():
    random = np.random.default_rng(0)
    noisy = (random.random((1, 9, 17, 33)) * 50).astype(np.float32)
    sources = [PACKED, serialization.pack_array(noisy), pack_array(noisy > 49), serialization.pack_array(np.zeros_like(noisy))]
    read = 0
    for _ in range(10_000):
        packed = bytearray(sources[random.integers(len(sources))])
        place = int(random.integers(min(len(packed), random.choice([120, 10**6]))))
        packed[place : place + random.integers(3)] = random.bytes(int(random.integers(3)))
        try:
            read += unpack_array(bytes(packed[: len(packed) if random.random() < 0.9 else place]), 10**6).size > 0
        except ValueError:
            pass
    assert 100 < read < 9900
