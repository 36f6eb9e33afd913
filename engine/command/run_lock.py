"""One run at a time in a run folder: `.lock`, locked for as long as its process lives and named after it.

The lock is the kernel's and ends with the process however that ends, so a killed run leaves nothing to take away.
"""

import contextlib
import errno
import os
import weakref
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart there
    fcntl = None  # type: ignore[assignment]

from engine.errors import InputError

LOCK = ".lock"
_held: dict[str, tuple[int, int]] = {}  # real path of the lock: descriptor, and the runs of this process that hold it


def lock_folder(folder: Path, owner: Any) -> str | None:
    """Lock a folder until `owner.unlock()` or `owner` is gone; None, or why not: another process's run is writing there.

    A process may lock a folder again. Where the file system knows no locks nothing is locked.
    """
    path = os.path.join(os.path.realpath(folder), LOCK)
    if fcntl is None:
        return None
    if path in _held:
        descriptor, runs = _held[path]
        _held[path] = descriptor, runs + 1
    else:
        opened = _open_locked(path)
        if opened is None:
            return f"{folder}: another run ({_holder(path)}) is writing there: expected another --output_dir, or that it has ended"
        if opened < 0:
            return None
        _held[path] = opened, 1
    owner.unlock = weakref.finalize(owner, _release, path, os.getpid())
    return None


def _open_locked(path: str) -> int | None:
    """A descriptor of the locked file, None where another process has it, -1 where it cannot be locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise InputError(f"{os.path.dirname(path)}: cannot be the output folder ({error.strerror})") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            return None if error.errno in (errno.EACCES, errno.EAGAIN) else -1
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else the run before has just removed it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
                return descriptor
        os.close(descriptor)


def _holder(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read(200).strip() or "a process"
    return "a process"


def _release(path: str, process: int) -> None:
    if process != os.getpid() or path not in _held:  # in a fork of the run
        return
    descriptor, runs = _held[path]
    if runs > 1:
        _held[path] = descriptor, runs - 1
        return
    del _held[path]
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.close(descriptor)
