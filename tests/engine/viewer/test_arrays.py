"""Packed arrays: what the client packs is read, what we pack it reads, and what is damaged is refused before it takes memory."""

import struct
import tracemalloc

import blosc2
import numpy as np
import pytest
from nnInteractive.inference.remote import serialization

from engine.viewer.arrays import TYPES, pack_array, unpack_array

SMALL = np.arange(60, dtype=np.int16).reshape(1, 3, 4, 5)
PACKED = serialization.pack_array(SMALL)
CHUNK = 8 + len("int16") + 4 * 8 + 4 + 16  # where the first chunk begins


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("shape", [(1, 7, 8, 9), (3,), (1, 1, 1, 1)])
def test_both_ways_agree_with_the_client(dtype, shape):
    random = np.random.default_rng(0)
    for array in ((random.random(shape) * 100).astype(dtype), np.zeros(shape, dtype)):
        for codec in (blosc2.Codec.ZSTD, blosc2.Codec.LZ4):
            read = unpack_array(serialization.pack_array(array, codec=codec), array.nbytes)
            assert read.dtype == array.dtype and (read == array).all()
        read = serialization.unpack_array(pack_array(array))
        assert read.dtype == array.dtype and (read == array).all()


def changed(place, *values):
    packed = bytearray(PACKED)
    packed[place : place + len(values)] = values
    return bytes(packed)


def of_shape(*shape, name=b"uint8"):
    return struct.pack(f"<4sBBBB{len(name)}s{len(shape)}qI", b"NNIA", 1, 1, len(shape), len(name), name, *shape, 0)


@pytest.mark.parametrize(
    "packed, message",
    [
        (b"NNI", "is cut short"),
        (PACKED[:40], "is cut short"),
        (changed(0, ord("M")), "not a packed array"),
        (changed(5, 9), "not a packed array"),
        (of_shape(3, name=b"object"), "an array of 'object' (expected one of bool"),
        (of_shape(3, name=b"\xff"), "no name in ASCII"),
        (of_shape(2**40, 2**40, 2**40), "bytes (expected at most 1,000)"),
        (of_shape(-3, -4), "an array of shape [-3, -4] (expected one to four dimensions, none of them empty)"),
        (of_shape(1, 1, 1, 1, 1), "expected one to four dimensions"),
        (of_shape(), "expected one to four dimensions"),
        (of_shape(4), "hold 0 bytes (expected 4, and nothing behind them)"),
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
    bomb = serialization.pack_array(np.zeros((1, 100, 1000, 1000), np.uint8))
    assert len(bomb) < 200
    tracemalloc.start()
    with pytest.raises(ValueError, match="an array of 100,000,000 bytes"):
        unpack_array(bomb, 10_000_000)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_fuzzed_arrays_are_read_or_refused():
    random = np.random.default_rng(0)
    noisy = (random.random((1, 9, 17, 33)) * 50).astype(np.float32)
    sources = [PACKED, serialization.pack_array(noisy), pack_array(noisy > 49), serialization.pack_array(np.zeros_like(noisy))]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(10_000):
        packed = bytearray(sources[random.integers(len(sources))])
        place = int(random.integers(min(len(packed), random.choice([120, 10**6]))))
        packed[place : place + random.integers(3)] = random.bytes(int(random.integers(3)))
        try:
            unpack_array(bytes(packed[: len(packed) if random.random() < 0.9 else place]), 10**6)
            outcomes["read"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
