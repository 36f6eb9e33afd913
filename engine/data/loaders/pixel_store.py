"""Decoded pixels in files of their own, to be mapped into memory: FOLDER/<key>.pixels.

    64 bytes    magic, rows, columns, channels, type, form, sum of what follows (`sum_of`); zeros
    then        the pixels, row by row: raw, or lz4's block of them

The header is written last. A file without one, or whose length or sum is wrong, counts as missing, so that processes may read
and write the same folder and a crash leaves nothing that is taken for pixels. Its place is taken by a whole one, written beside it
and renamed; where there is no file yet, that would be a third of the time. The folder is held to a size: when it has grown beyond
it, the files that have not been asked for longest go. A full disk, or a folder that cannot be written, costs time and nothing else.
"""

import contextlib
import errno
import logging
import mmap
import os
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.files import NEW_FILE

HEADER = struct.Struct("<8sIIHBBI")
MAGIC, OFFSET, SUFFIX = b"VSLPIX02", 64, ".pixels"
TYPES = (np.dtype(np.uint8), np.dtype("<u2"), np.dtype("<i2"), np.dtype("<f4"))
RAW, LZ4 = 0, 1
KEPT_SHARE = 0.9  # of the largest size, after files were taken away
PAGE = 512  # words of 8 bytes that are summed
ABANDONED = 3600  # seconds after which the unfinished file of a killed process is taken away
logger = logging.getLogger(__name__)


class _Header(NamedTuple):
    rows: int
    columns: int
    channels: int  # 0: pixels are [rows, columns]
    kind: int
    form: int
    checksum: int


class PixelStore:
    """Arrays [H, W] or [H, W, C] of uint8, uint16, int16 or float32, by keys of hexadecimal digits."""

    def __init__(self, folder: Path, most_bytes: int, *, compress: bool = False):
        """`compress`: lz4's block of an array, where the wheel lz4 is installed, half of the room for ten times the time."""
        self.folder, self.most_bytes, self.compress = folder, most_bytes, compress
        self._checked: set[str] = set()
        self._size: int | None = None  # of the folder, as far as this process knows
        self._may_write = True

    def find(self, key: str) -> np.ndarray | None:
        """The pixels, read-only and where they can be in the file's own memory; None where there are none that are whole."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data: mmap.mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # none, or an empty one
            return None
        pixels = self._read(data, check=key not in self._checked)
        if pixels is not None and key not in self._checked:
            self._checked.add(key)
            with contextlib.suppress(OSError):
                os.utime(path)  # asked for now
        return pixels

    def keep(self, key: str, pixels: np.ndarray) -> None:
        """Write them, and make room where there is too little. Nothing happens where nothing can be written."""
        kind = pixels.dtype.newbyteorder("<") if pixels.dtype.itemsize > 1 else pixels.dtype
        if not self._may_write or kind not in TYPES or pixels.ndim not in (2, 3) or not pixels.size:
            return
        block, form = self._pack(np.ascontiguousarray(pixels, dtype=kind))
        if len(block) + OFFSET > self.most_bytes * KEPT_SHARE:
            return
        channels = pixels.shape[2] if pixels.ndim == 3 else 0
        header = HEADER.pack(MAGIC, *pixels.shape[:2], channels, TYPES.index(kind), form, sum_of(block))
        try:
            self._write(self._path(key), header.ljust(OFFSET, b"\0"), block)
        except OSError as error:
            self._may_write = False
            logger.warning("%s: decoded images are not kept from now on (%s)", self.folder, error.strerror or error)
            return
        self._checked.add(key)
        self._size = (self._size if self._size is not None else sum(size for *_, size in self._files())) + OFFSET + len(block)
        if self._size > self.most_bytes:
            self._make_room()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _pack(self, pixels: np.ndarray) -> tuple[memoryview | bytes, int]:
        if self.compress:
            import lz4.block

            return lz4.block.compress(pixels.data.cast("B"), store_size=False), LZ4
        return pixels.data.cast("B"), RAW

    def _read(self, data: mmap.mmap, *, check: bool) -> np.ndarray | None:
        header = _parse(data)
        if header is None:
            return None
        shape = (header.rows, header.columns, header.channels)[: 3 if header.channels else 2]
        kind = TYPES[header.kind]
        length = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        block = memoryview(data)[OFFSET:]
        if check and sum_of(block) != header.checksum:
            return None
        if header.form == RAW:
            return np.frombuffer(block, kind).reshape(shape) if len(block) == length else None
        try:
            import lz4.block

            return np.frombuffer(lz4.block.decompress(block, uncompressed_size=length), kind).reshape(shape)
        except (ImportError, lz4.block.LZ4BlockError, ValueError):
            return None

    def _write(self, path: Path, header: bytes, block: memoryview | bytes) -> None:
        try:
            _write_new(path, header, block)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write_new(path, header, block)
        except FileExistsError:  # a damaged one, or one that another process is writing
            staging = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}")
            with contextlib.suppress(FileNotFoundError):
                staging.unlink()  # of a killed process
            _write_new(staging, header, block)
            os.replace(staging, path)

    def _files(self) -> list[tuple[float, Path, int]]:
        """(when it was asked for last, path, bytes) of every file; those that a killed process left unfinished go."""
        found = []
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.suffix == SUFFIX:
                    found.append((status.st_mtime, path, status.st_size))
                elif time.time() - status.st_mtime > ABANDONED:
                    path.unlink()
        return found

    def _make_room(self) -> None:
        files = sorted(self._files())
        self._size = sum(size for *_, size in files)
        for _, path, size in files:
            if self._size <= KEPT_SHARE * self.most_bytes:
                return
            with contextlib.suppress(OSError):  # another process took it, or reads it (Windows)
                path.unlink()
                self._size -= size


def sum_of(block: memoryview | bytes) -> int:
    """32 bits of all of its bytes: the CRC of its pages' sums, an eighth of the time of its own CRC."""
    words = np.frombuffer(block, "<u8", len(block) // 8)
    whole = len(words) // PAGE * PAGE
    sums = np.add.reduce(words[:whole].reshape(-1, PAGE), axis=1)
    return zlib.crc32(block[8 * whole :], zlib.crc32(sums.astype("<u8").tobytes()))


def _write_new(path: Path, header: bytes, block: memoryview | bytes) -> None:
    """OSError, and no file, where it cannot be written whole; FileExistsError where there is one already."""
    descriptor = os.open(path, NEW_FILE, 0o600)  # pixels of patients
    try:
        try:
            for place, part in ((len(header), block), (0, header)):
                os.lseek(descriptor, place, os.SEEK_SET)
                if os.write(descriptor, part) != len(part):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _parse(data: mmap.mmap) -> _Header | None:
    if len(data) < OFFSET:
        return None
    magic, *numbers = HEADER.unpack_from(data)
    header = _Header(*numbers)
    known = magic == MAGIC and header.kind < len(TYPES) and header.form in (RAW, LZ4)
    return header if known and header.rows * header.columns * max(1, header.channels) < 2**34 else None
