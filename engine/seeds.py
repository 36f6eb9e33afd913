"""One way to make a seed of several numbers: each combination has its own, the same in every process and on every machine."""

import zlib


def derive_seed(*parts: int | str) -> int:
    """A seed below 2^32 that follows from the parts and their order."""
    return zlib.crc32(" ".join(map(str, parts)).encode())
