"""Files of a public S3 bucket over HTTPS: listed, fetched in parallel, resumed where they stopped, and checked.

A file is written as `.NAME.part` and renamed to NAME once its size is the listed one, and its MD5 too where the listing has it (an
ETag of 32 hex digits). So a file NAME of the listed size is whole, and is not fetched again. No more is written than is listed.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote
from xml.etree import ElementTree

from tqdm import tqdm

from engine.errors import InputError
from engine.http_session import HTTPSession, Refused, is_web_address, shown_address
from engine.progress import progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PAUSE = 1.0  # seconds, see HTTPSession
WORKERS = 8
LONGEST_LISTING = 2**24  # bytes of a page of 1,000 names
MOST_PAGES = 2_000
# What Windows takes for a device, also with an ending, and what it cannot keep at the end of a name.
WINDOWS_NAMES = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?|.*[. ]")


@dataclass(frozen=True)
class RemoteFile:
    """`name` is the key without the bucket's prefix: a relative path with slashes."""

    name: str
    key: str
    size: int
    etag: str

    @property
    def md5(self) -> str | None:
        """The MD5 of its content; None for a file that was uploaded in parts, whose ETag is another hash."""
        return self.etag if re.fullmatch(r"[0-9a-f]{32}", self.etag) else None


@dataclass(frozen=True)
class Bucket:
    """The files below `prefix` of the bucket at `url`."""

    url: str
    prefix: str = ""

    def __post_init__(self) -> None:
        if not is_web_address(self.url):
            raise InputError(f"{shown_address(self.url)}: not the address of a bucket (expected https://HOST)")

    @property
    def shown(self) -> str:
        """The address as it may be shown."""
        return shown_address(self.url).split("?")[0]

    def files(self, include: str = "") -> list[RemoteFile]:
        """All files whose name begins with `include`.

        InputError if the bucket cannot be read, lists a path outside a folder or one name twice, or lists without end.
        """
        found: dict[str, RemoteFile] = {}
        try:
            for entry in progress(self._entries(include), desc="listing", unit=" files"):
                file = self._remote_file(entry)
                if file.name in found:
                    raise ValueError(f"it lists {file.name[:80]!r} twice")
                found[file.name] = file
        except OSError as error:
            raise InputError(f"{self.shown}: cannot be reached: {error}") from None
        except (ValueError, ElementTree.ParseError) as error:
            raise InputError(f"{self.shown}: does not answer as a bucket does: {error}") from None
        return list(found.values())

    def _entries(self, include: str) -> Iterator[ElementTree.Element]:
        session, token = HTTPSession(self.url, pause=PAUSE), None
        seen: set[str | None] = set()
        while token != "":
            if token in seen or len(seen) >= MOST_PAGES:
                raise ValueError("its listing repeats itself" if token in seen else f"its listing has more than {MOST_PAGES} pages")
            seen.add(token)
            query = {"list-type": "2", "prefix": self.prefix + include} | ({"continuation-token": token} if token else {})
            text = session.read("GET", "/", LONGEST_LISTING, params=query).decode()
            if "<!DOCTYPE" in text or "<!ENTITY" in text:
                raise ValueError("a listing with entities")
            page = ElementTree.fromstring(re.sub(r'\sxmlns="[^"]*"', "", text, count=1))
            # folders of their own are empty files with such names
            yield from (entry for entry in page.iter("Contents") if not entry.findtext("Key", "").endswith("/"))
            token = page.findtext("NextContinuationToken", "")

    def _remote_file(self, entry: ElementTree.Element) -> RemoteFile:
        key, etag = entry.findtext("Key", ""), entry.findtext("ETag", "").strip('"').lower()
        size = entry.findtext("Size", "")
        if not re.fullmatch(r"[0-9]{1,15}", size):
            raise ValueError(f"it lists {key[:80]!r} with the size {size[:80]!r}")
        return RemoteFile(self._safe_name(key), key, int(size), etag)

    def _safe_name(self, key: str) -> str:
        name = key.removeprefix(self.prefix)
        path = PurePosixPath(name)
        if (
            not key.startswith(self.prefix)
            or not path.parts
            or path.is_absolute()
            or ".." in path.parts
            or re.search(r"[\\:\x00-\x1f\x7f]", name)
            or any(WINDOWS_NAMES.fullmatch(part) for part in path.parts)
            or (path.name.startswith(".") and path.name.endswith(".part"))  # what a part of another file is called
        ):
            raise InputError(f"{self.shown}: lists {key[:80]!r} (expected names that stay inside a folder)")
        return name

    def fetch(self, files: list[RemoteFile], folder: str | Path) -> dict[str, int]:
        """Fetch the files that `folder` lacks; {"fetched": files, "kept": files that were there, "bytes": received}.

        InputError, naming the file and the reason, if one cannot be fetched; what has arrived stays and is not fetched again.
        """
        folder = Path(folder)
        missing = [file for file in files if not (path := folder / file.name).is_file() or _size(path) != file.size]
        needed = sum(max(0, file.size - _size(_part(folder / file.name))) for file in missing)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        received: list[int] = []
        with (
            _locked(folder),
            progress(total=needed, desc="downloading", unit="B", unit_scale=True) as bar,
            ThreadPool(WORKERS) as pool,  # the end of a ThreadPool's block does not wait for its threads
            HTTPSession(self.url, pause=PAUSE) as session,
        ):
            list(pool.imap_unordered(lambda file: self._fetch_file(file, folder / file.name, session, bar, received), missing))
        return {"fetched": len(missing), "kept": len(files) - len(missing), "bytes": sum(received)}

    def _fetch_file(self, file: RemoteFile, path: Path, session: HTTPSession, bar: tqdm, received: list[int]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            session.with_retries(lambda: _complete(_part(path), file, session, bar, received))
            os.replace(_part(path), path)
        except OSError as error:
            raise InputError(f"{file.name}: cannot be fetched from {self.shown}: {error}") from None


def _complete(part: Path, file: RemoteFile, session: HTTPSession, bar: tqdm, received: list[int]) -> None:
    """Fetch the rest of the part, and check the whole: a wrong part is deleted, a short one is kept and continued later."""
    with _opened(part) as target:
        have = os.fstat(target.fileno()).st_size
        if have > file.size:
            have = target.truncate(0)
        if not 0 < have == file.size:
            have = _fetch_rest(target, have, file, session, bar, received)
        target.seek(0)
        right = have == file.size and file.md5 in (None, hashlib.file_digest(target, "md5").hexdigest())  # type: ignore[arg-type]
    if have < file.size:
        raise ConnectionError(f"the connection ended after {have} of {file.size} bytes")
    if not right:
        part.unlink()
        raise ConnectionError("its content is not what the bucket lists (size or MD5)")


def _fetch_rest(target: BinaryIO, have: int, file: RemoteFile, session: HTTPSession, bar: tqdm, received: list[int]) -> int:
    """Write what is missing after `have` bytes; returns how many there are then: one more than is listed where more were sent."""
    headers = {"Range": f"bytes={have}-", "If-Match": f'"{file.etag}"'} if have else {}
    try:
        with session.open("GET", f"/{quote(file.key)}", headers=headers) as response:
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
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other download into the folder is running on this machine; InputError where one is."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{folder}: another download into it is running") from None
    finally:
        os.close(descriptor)  # and the lock with it


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
