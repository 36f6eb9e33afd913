"""Files written whole, under a temporary name in the same folder, then renamed, so that no reader sees half a file; and files that
a user names, read so that nothing blocks and no memory is filled.
"""

import errno
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

KINDS = {  # what stands where a file was expected
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write text (UTF-8) or bytes to `path` in one step; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # a name that nobody can have put there before
    try:
        with os.fdopen(os.open(temporary, NEW_FILE, 0o666), "wb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # what the caller knows
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return path


def open_regular(path: str | Path) -> BinaryIO:
    """`path` opened for reading, where it is a regular file or a link to one.

    OSError if it is not there or anything else (a folder, named pipe, device or socket), whose `strerror` says what; also for
    names that no file can have. Never waits, as opening a pipe would.
    """
    try:
        _refuse_irregular(os.stat(path).st_mode, path)  # first: opening a device can already do something
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:  # a null character, or one that the file system cannot encode
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    file = open(descriptor, "rb")
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode, path)  # again: it may have been replaced since
    except OSError:
        file.close()
        raise
    return file


def _refuse_irregular(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))


def read_bounded(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; OSError as `open_regular`, and where the file is larger."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes (expected at most {limit:,})", str(path))
        return file.read(size)


def refuse_overwriting(outputs: Mapping[str, str | Path | None], inputs: Mapping[str, str | Path | None]) -> None:
    """InputError if a file to be written is one that is read, or in a folder that is, also by a link or another spelling;
    {flag: path, or None}."""
    for flag, written in outputs.items():
        for other, read in inputs.items():
            if written and read and _is_same_file(written, read):
                raise InputError(f"{flag} {written}: is the file that {other} names (expected another; nothing was written)")
            inside = visible_files(Path(read), "**/*") if read and os.path.isfile(written or "") and os.path.isdir(read) else []
            if any(_is_same_file(written or "", file) for file in inside):
                raise InputError(f"{flag} {written}: is in the folder that {other} names (expected another; nothing was written)")


def refuse_unwritable(flag: str, path: Path) -> None:
    """InputError where nothing can be written to `path`; its folder is made where it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def _is_same_file(first: str | Path, second: str | Path) -> bool:
    try:
        return os.path.realpath(first) == os.path.realpath(second) or os.path.samefile(first, second)
    except (OSError, ValueError):  # one of them is not there yet, or cannot be
        return False


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """The files in `folder` that match, sorted, without what systems and editors leave behind.

    That is whatever begins with a dot, file or folder: macOS' `._x.png` and `.DS_Store`, `.ipynb_checkpoints/x.csv`.
    """
    found = (path for path in folder.glob(pattern) if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(path for path in found if path.is_file())


def write_json(path: str | Path, data: Any) -> Path:
    """`write_whole` of `data` as indented JSON."""
    return write_whole(path, as_json(data))


def as_json(data: Any) -> str:
    """`data` as indented JSON, its letters as they are."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def json_line(data: Any) -> bytes:
    """`data` as one line of JSON (UTF-8), its letters as they are; what some readers take for the end of a line is escaped."""
    text = json.dumps(plain(data), ensure_ascii=False).translate(_BREAKS)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate as \ud800, which is JSON


def plain(value: Any, digits: int | None = None) -> Any:
    """`value` in JSON's own types: tensors and NumPy numbers as numbers, non-finite ones as None, the rest by `str`.

    With `digits`, floats keep that many significant digits.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item, digits) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), digits)
    if isinstance(value, Enum):
        return plain(value.value, digits)
    if isinstance(value, float):
        return (float(f"{value:.{digits}g}") if digits else value) if math.isfinite(value) else None
    return value if value is None or type(value) in (bool, int, str) else str(value)


def cache_folder() -> Path:
    """Where derived data may be kept: `VESALIUS_CACHE`, by default `~/.cache/vesalius`; made where it is missing.

    InputError where there can be no such folder, or nothing can be written to it.
    """
    try:
        folder = Path(os.environ.get("VESALIUS_CACHE") or Path.home() / ".cache" / "vesalius")
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError:
        raise InputError("no home folder is known: expected VESALIUS_CACHE to name a folder for derived data") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be the cache folder ({error.strerror}); VESALIUS_CACHE names another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be the cache folder (not writable); VESALIUS_CACHE names another")
    return folder


@contextmanager
def locked_folder(folder: Path, *, wait: bool) -> Iterator[None]:
    """Inside, no other process of this machine is within the same folder's; without `wait`, BlockingIOError where one is.

    Where the system or the folder's file system has no locks, there is none.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)  # and the lock with it
