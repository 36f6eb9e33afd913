"""Files of a web server whose listing is known: fetched in parallel, resumed where they stopped, and checked.

A file is written as `.NAME.part` and renamed to NAME once its size and, where the listing has one, its hash are the listed ones.
What lies there already with that size and hash is kept. No more is written than is listed, and nothing outside the folder.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tqdm import tqdm

from engine.errors import InputError
from engine.files import locked_folder
from engine.http_session import HTTPSession, Refused
from engine.progress import progress

# What Windows takes for a device, also with an ending, and what it cannot keep at the end of a name.
WINDOWS_NAMES = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?|.*[. ]")


@dataclass(frozen=True)
class RemoteFile:
    """A file as it is listed: `name` is a relative path with slashes, `path` what the server is asked for, `size` in bytes.

    `digest` is (kind, hexadecimal), or None where no hash is listed: kinds are those of `hashlib`, and "git", which is the SHA-1 of
    "blob SIZE\\0" and the content. `same` are headers with which the server sends the rest of a file only if it is still this one.
    """

    name: str
    path: str
    size: int
    digest: tuple[str, str] | None = None
    same: dict[str, str] = field(default_factory=dict)


def is_safe_name(name: str) -> bool:
    """Whether a relative path with slashes stays inside a folder, on Windows too, and is no name of ours."""
    path = PurePosixPath(name)
    return not (
        not path.parts
        or path.is_absolute()
        or ".." in path.parts
        or re.search(r"[\\:\x00-\x1f\x7f]", name)
        or any(WINDOWS_NAMES.fullmatch(part) for part in path.parts)
        or (path.name.startswith(".") and path.name.endswith(".part"))  # what a part of another file is called
    )


def fetch(
    files: Sequence[RemoteFile], folder: str | Path, session: HTTPSession, *, workers: int = 8, resume: bool = True, **request: Any
) -> dict[str, int]:
    """Fetch the files that `folder` lacks; {"fetched": files, "kept": files that were there, "bytes": received}.

    `workers`: files fetched at the same time. `resume` False: what an earlier call left of a file is not continued. `request` as in
    `HTTPSession.open`. InputError, naming the file and the reason, if one cannot be fetched, and before anything is written where
    the disk is too small; what has arrived stays and is not fetched again.
    """
    folder = Path(folder)
    there = sum(_size(folder / file.name) == file.size for file in files)
    with progress(total=there, desc="checking", unit=" files", leave=False, disable=not there) as bar:
        missing = [file for file in files if not _is_whole(folder / file.name, file, bar)]
    needed = sum(max(0, file.size - (_size(_part(folder / file.name)) if resume else 0)) for file in missing)
    free = shutil.disk_usage(_nearest(folder)).free
    if needed > free:
        raise InputError(f"{folder}: {_gigabytes(needed)} are needed and {_gigabytes(free)} are free")
    folder.mkdir(parents=True, exist_ok=True)
    received: list[int] = []

    def fetch_one(file: RemoteFile) -> None:
        path = folder / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not resume:
                _part(path).unlink(missing_ok=True)
            session.with_retries(lambda: _complete(_part(path), file, session, bar, received, request))
            os.replace(_part(path), path)
        except OSError as error:
            raise InputError(f"{file.name}: cannot be fetched from {session.url}: {error}") from None

    with (
        _alone_in(folder),
        progress(total=needed, desc="downloading", unit="B", unit_scale=True) as bar,
        ThreadPool(workers) as pool,  # the end of a ThreadPool's block does not wait for its threads
        session,
    ):
        list(pool.imap_unordered(fetch_one, missing))
    return {"fetched": len(missing), "kept": len(files) - len(missing), "bytes": sum(received)}


def _is_whole(path: Path, file: RemoteFile, bar: tqdm) -> bool:
    if not path.is_file() or _size(path) != file.size:
        return False
    bar.update()
    with path.open("rb") as content:
        return _has_digest(content, file)


def _has_digest(content: BinaryIO, file: RemoteFile) -> bool:
    if file.digest is None:
        return True
    kind, expected = file.digest
    hasher = hashlib.sha1(b"blob %d\0" % file.size) if kind == "git" else hashlib.new(kind)
    return hashlib.file_digest(content, lambda: hasher).hexdigest() == expected  # type: ignore[arg-type]


def _complete(part: Path, file: RemoteFile, session: HTTPSession, bar: tqdm, received: list[int], request: dict[str, Any]) -> None:
    """Fetch the rest of the part, and check the whole: a wrong part is deleted, a short one is kept and continued later."""
    with _opened(part) as target:
        have = os.fstat(target.fileno()).st_size
        if have > file.size:
            have = target.truncate(0)
        if not 0 < have == file.size:
            have = _fetch_rest(target, have, file, session, bar, received, request)
        target.seek(0)
        right = have == file.size and _has_digest(target, file)
    if have < file.size:
        raise ConnectionError(f"the connection ended after {have} of {file.size} bytes")
    if not right:
        part.unlink()
        hashed = file.digest[0].replace("git", "sha1").upper() if file.digest else "hash"
        raise ConnectionError(f"its content is not what is listed (size or {hashed})")


def _fetch_rest(
    target: BinaryIO, have: int, file: RemoteFile, session: HTTPSession, bar: tqdm, received: list[int], request: dict[str, Any]
) -> int:
    """Write what is missing after `have` bytes; returns how many there are then: one more than is listed where more were sent."""
    headers = {"Range": f"bytes={have}-"} | file.same if have else {}
    try:
        with session.open("GET", file.path, headers=headers, **request) as response:
            where = f"bytes {have}-"
            continued = response.status_code == 206 and response.headers.get("Content-Range", where).startswith(where)
            if not continued:  # without ranges it is sent all again
                have = target.truncate(0)
            target.seek(have)
            for data in takewhile(lambda _: not session.stopped.is_set(), response.iter_raw()):
                if have + len(data) > file.size:
                    return file.size + 1
                have += target.write(data)
                received.append(len(data))
                bar.update(len(data))
    except Refused as error:
        if have and error.status in (412, 416):  # the part is of another version of the file
            target.truncate(0)
            raise ConnectionError(f"{error}: it has changed") from None
        raise
    return have


@contextmanager
def _opened(part: Path) -> Iterator[BinaryIO]:
    """The part to read and write, made where it is missing; OSError where its name is a link or no regular file."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(part, flags, 0o666)
    except OSError as error:
        raise OSError(f"{part}: cannot be written ({error.strerror})") from None
    with os.fdopen(descriptor, "r+b") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{part}: not a regular file")
        yield file


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other download into the folder is running on this machine; InputError where one is."""
    try:
        with locked_folder(folder, wait=False):
            yield
    except BlockingIOError:
        raise InputError(f"{folder}: another download into it is running") from None


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
