"""Files of a public S3 bucket over HTTPS: listed, fetched in parallel, resumed where they stopped, and checked.

A file is written as `.NAME.part` and renamed to NAME once its size is the listed one, and its MD5 too where the listing has it (an
ETag of 32 hex digits). So a file NAME of the listed size is whole, and is not fetched again.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from urllib.parse import quote
from xml.etree import ElementTree

from tqdm import tqdm

from engine.errors import InputError
from engine.http_session import HTTPSession, is_web_address
from engine.progress import progress

PAUSE = 1.0  # seconds, see HTTPSession
WORKERS = 8
LONGEST_LISTING = 2**24  # bytes of a page of 1,000 names


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
            raise InputError(f"{self.url}: not the address of a bucket (expected https://HOST)")

    def files(self, include: str = "") -> list[RemoteFile]:
        """All files whose name begins with `include`. InputError if the bucket cannot be read or names a path outside a folder."""
        try:
            entries = progress(self._entries(include), desc="listing", unit=" files")
            return [self._remote_file(entry) for entry in entries]
        except OSError as error:
            raise InputError(f"{self.url}: cannot be reached: {error}") from None
        except (ValueError, ElementTree.ParseError) as error:
            raise InputError(f"{self.url}: does not answer as a bucket does: {error}") from None

    def _entries(self, include: str) -> Iterator[ElementTree.Element]:
        session, token = HTTPSession(self.url, pause=PAUSE), None
        while token != "":
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
        return RemoteFile(self._safe_name(key), key, int(entry.findtext("Size", "")), etag)

    def _safe_name(self, key: str) -> str:
        name = key.removeprefix(self.prefix)
        path = PurePosixPath(name)
        if (
            not key.startswith(self.prefix)
            or not path.parts
            or path.is_absolute()
            or ".." in path.parts
            or re.search(r"[\\\0:]", name)
        ):
            raise InputError(f"{self.url}: lists {key[:80]!r} (expected names that stay inside a folder)")
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
            raise InputError(f"{file.name}: cannot be fetched from {self.url}: {error}") from None


def _complete(part: Path, file: RemoteFile, session: HTTPSession, bar: tqdm, received: list[int]) -> None:
    """Fetch the rest of the part, and check the whole: a wrong part is deleted, a short one is kept and continued later."""
    have = _size(part)
    if not 0 < have == file.size:
        headers = {"Range": f"bytes={have}-", "If-Match": f'"{file.etag}"'} if 0 < have < file.size else {}
        with session.open("GET", f"/{quote(file.key)}", headers=headers) as response:
            with open(part, "ab" if response.status_code == 206 else "wb") as target:  # without ranges it is sent all again
                for data in takewhile(lambda _: not session.stopped.is_set(), response.iter_raw()):
                    target.write(data)
                    received.append(len(data))
                    bar.update(len(data))
    have = _size(part)
    if have < file.size:
        raise ConnectionError(f"the connection ended after {have} of {file.size} bytes")
    with open(part, "rb") as content:
        digest = hashlib.file_digest(content, "md5").hexdigest()
    if have != file.size or file.md5 not in (None, digest):
        part.unlink()
        raise ConnectionError("its content is not what the bucket lists (size or MD5)")


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
