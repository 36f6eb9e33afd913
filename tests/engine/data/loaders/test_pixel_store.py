"""Decoded pixels on the disk: what is kept comes back, damage counts as nothing, the folder keeps to its size."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from engine.data.loaders.pixel_store import OFFSET, PixelStore, sum_of


def pixels(seed=0, shape=(17, 23, 3), kind=np.uint8):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(kind)


def kept_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32, ">u2"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1, 1)])
def test_pixels_come_back_in_another_store(tmp_path, compress, kind, shape):
    stored = pixels(shape=shape, kind=kind)
    PixelStore(tmp_path, 1 << 20, compress=compress).keep("ab12", stored)
    found = PixelStore(tmp_path, 1 << 20).find("ab12")
    np.testing.assert_array_equal(found, stored)
    assert found.dtype.kind == stored.dtype.kind and not found.flags.writeable
    assert PixelStore(tmp_path, 1 << 20).find("cd34") is None


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", ["cut", "header", "changed", "empty", "longer", "unfinished"])
def test_a_damaged_file_counts_as_missing_and_is_made_again(tmp_path, compress, damage):
    PixelStore(tmp_path, 1 << 20, compress=compress).keep("ab12", pixels())
    [file] = kept_files(tmp_path)
    data = bytearray(file.read_bytes())
    if damage == "changed":
        data[OFFSET + 5] ^= 1
    if damage == "header":
        data[:4] = b"what"
    if damage == "unfinished":  # by a process that was killed
        data[:OFFSET] = bytes(OFFSET)
    content = {"cut": data[:-1], "empty": b"", "longer": data + b"x"}.get(damage, bytes(data))
    file.write_bytes(content)
    store = PixelStore(tmp_path, 1 << 20, compress=compress)
    assert store.find("ab12") is None
    store.keep("ab12", pixels())
    np.testing.assert_array_equal(PixelStore(tmp_path, 1 << 20).find("ab12"), pixels())
    assert kept_files(tmp_path) == [file]


@pytest.mark.parametrize("length", [1, 7, 8, 4096, 3 * 4096 + 21])
def test_every_byte_counts_in_the_sum(length):
    data = bytearray(np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes())
    whole = sum_of(bytes(data))
    for place in {0, length // 2, length - 1}:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert sum_of(bytes(data)) != whole
            data[place] ^= 1 << bit
    assert sum_of(memoryview(data)) == whole != sum_of(bytes(data) + b"\0")


def test_the_folder_keeps_to_its_size_and_what_was_asked_for_last_stays(tmp_path):
    size = pixels().nbytes + OFFSET
    store = PixelStore(tmp_path, 10 * size)
    for i in range(9):
        store.keep(f"{i:02}", pixels(i))
        os.utime(kept_files(tmp_path)[-1], (i, i))
    assert PixelStore(tmp_path, 10 * size).find("00") is not None  # asked for now
    for i in range(9, 12):
        store.keep(f"{i:02}", pixels(i))
    left = {file.stem for file in kept_files(tmp_path)}
    assert {"00", "09", "10", "11"} <= left and "01" not in left and "02" not in left
    assert sum(file.stat().st_size for file in kept_files(tmp_path)) <= 10 * size
    store.keep("large", pixels(shape=(100, 100, 3)))  # more than there may ever be
    assert store.find("large") is None


def write_many(folder, seed):
    store = PixelStore(folder, 1 << 22)
    for i in range(200):
        key = f"{(i * 7 + seed) % 20:02}"
        store.keep(key, pixels(int(key)))
        found = store.find(key)
        assert found is not None and (found == pixels(int(key))).all()


def test_processes_write_and_read_the_same_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(tmp_path, seed)) for seed in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert len(kept_files(tmp_path)) == 20


def test_a_disk_that_takes_no_more_costs_nothing_but_time(tmp_path):
    """The system refuses files of more than 1,000 bytes, as it would on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of files are POSIX's")
    assert resource.RLIMIT_FSIZE is not None
    script = f"""
import resource, signal
import numpy as np
from pathlib import Path
from engine.data.loaders.pixel_store import PixelStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = PixelStore(Path({str(tmp_path)!r}), 1 << 20)
for key in ("ab", "cd"):
    store.keep(key, np.zeros((100, 100, 3), np.uint8))
    assert store.find(key) is None
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("decoded images are not kept from now on") == 1 and kept_files(tmp_path) == []


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path):
    store = PixelStore(tmp_path, 4 * (pixels().nbytes + OFFSET))
    for name, age in ((".old.1.1", 7200), (".young.1.1", 10)):
        (tmp_path / name).write_bytes(b"part")
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    for i in range(5):
        store.keep(f"{i:02}", pixels(i))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".pixels"] == [".young.1.1"]
