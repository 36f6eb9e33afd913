"""Files of a public S3 bucket over HTTPS: listed, fetched in parallel, resumed where they stopped, and checked.

A file is written under `.NAME.part` and gets its name once its size, and its MD5 where the bucket tells it (an ETag of 32 hex
digits), are those of the listing; so a file that stands under its name with the listed size is whole and is kept.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from tqdm.auto import tqdm

from engine.errors import InputError
from engine.processes import rank

TRIES = 4
TIMEOUT = 60.0  # seconds without a byte
PAUSE = 1.0  # seconds before the second attempt, doubled before each further one
WORKERS = 8
CHUNK = 2**18
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
        """The MD5 of its content; files that were uploaded in parts do not tell it."""
        return self.etag if re.fullmatch(r"[0-9a-f]{32}", self.etag) else None


class _Damaged(Exception):
    """What arrived is not what was listed."""


@dataclass(frozen=True)
class Bucket:
    """The files below `prefix` of the bucket at `url`."""

    url: str
    prefix: str = ""

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"{self.url}: not the address of a bucket (expected https://HOST)")

    def files(self, include: str = "") -> list[RemoteFile]:
        """All files whose name begins with `include`. InputError if the bucket cannot be read or names a path outside a folder."""
        files, token = [], None
        while True:
            query = {"list-type": "2", "prefix": self.prefix + include} | ({"continuation-token": token} if token else {})
            page = self._page(f"{self.url.rstrip('/')}/?{urllib.parse.urlencode(query)}")
            for entry in page.iter("Contents"):
                key = entry.findtext("Key", "")
                if not key.endswith("/"):  # folders of their own are empty files with such names
                    etag = entry.findtext("ETag", "").strip('"').lower()
                    files.append(RemoteFile(self._safe_name(key), key, int(entry.findtext("Size", "")), etag))
            token = page.findtext("NextContinuationToken")
            if not token:
                return files

    def _page(self, url: str) -> ElementTree.Element:
        def read() -> ElementTree.Element:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                text = response.read(LONGEST_LISTING).decode()
            if "<!DOCTYPE" in text or "<!ENTITY" in text:
                raise ValueError("a listing with entities")
            return ElementTree.fromstring(re.sub(r'\sxmlns="[^"]*"', "", text, count=1))

        try:
            return _with_patience(read)
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{self.url}: cannot be reached: {_reason(error)}") from None
        except (ValueError, ElementTree.ParseError) as error:
            raise InputError(f"{self.url}: does not answer as a bucket does: {error}") from None

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
        """Bring `folder` to hold the files; {"fetched", "kept": files, "bytes": those that came over the network}.

        InputError, naming the file and the reason, if one cannot be fetched; what has arrived stays and is not fetched again.
        """
        folder = Path(folder)
        missing = [file for file in files if not _is_whole(folder / file.name, file)]
        partial = {file.name: _size(_part(folder / file.name)) for file in missing}
        needed = sum(max(0, file.size - partial[file.name]) for file in missing)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        stop, pool, received = threading.Event(), ThreadPoolExecutor(WORKERS), 0
        with tqdm(total=needed, desc="downloading", unit="B", unit_scale=True, disable=rank() != 0) as bar:
            try:
                for count in pool.map(lambda file: self._fetch_file(file, folder / file.name, bar, stop), missing):
                    received += count
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        return {"fetched": len(missing), "kept": len(files) - len(missing), "bytes": received}

    def _fetch_file(self, file: RemoteFile, path: Path, bar: tqdm, stop: threading.Event) -> int:
        """Bytes received."""
        received = 0

        def attempt() -> None:
            nonlocal received
            for data_size in self._receive(file, path, stop):
                received += data_size
                bar.update(data_size)
            _check(file, _part(path))

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _with_patience(attempt, stop)
            os.replace(_part(path), path)
        except (OSError, http.client.HTTPException, _Damaged) as error:
            raise InputError(f"{file.name}: cannot be fetched from {self.url}: {_reason(error)}") from None
        return received

    def _receive(self, file: RemoteFile, path: Path, stop: threading.Event) -> Iterator[int]:
        """Append what is lacking to the part file; yields the sizes of what came."""
        have = _size(_part(path))
        if have > file.size:
            _part(path).unlink()
            have = 0
        if have == file.size > 0:
            return
        headers = {"Range": f"bytes={have}-", "If-Match": f'"{file.etag}"'} if have else {}
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{urllib.parse.quote(file.key)}", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            resumed = response.status == 206
            with open(_part(path), "ab" if resumed else "wb") as target:  # a server without ranges sends it all again
                while (data := response.read(CHUNK)) and not stop.is_set():
                    target.write(data)
                    yield len(data)


def _check(file: RemoteFile, part: Path) -> None:
    """_Damaged if the part is not the listed file; a wrong one is deleted, a short one stays to be continued."""
    if part.stat().st_size < file.size:
        raise _Damaged(f"the connection ended after {part.stat().st_size} of {file.size} bytes")
    with open(part, "rb") as content:
        digest = hashlib.file_digest(content, "md5").hexdigest()
    if part.stat().st_size != file.size or file.md5 not in (None, digest):
        part.unlink()
        raise _Damaged("its content is not what the bucket lists (size or MD5)")


def _with_patience(attempt, stop: threading.Event | None = None):
    """`attempt()`, again after a pause where the network or the server failed in a way that may pass."""
    for left in reversed(range(TRIES)):
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            if left == 0 or error.code < 500 and error.code not in (408, 429):
                raise
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, _Damaged):
            if left == 0:
                raise
        if stop is not None and stop.wait(PAUSE * 2 ** (TRIES - 1 - left)):
            raise InterruptedError("another file failed")
        if stop is None:
            time.sleep(PAUSE * 2 ** (TRIES - 1 - left))


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}".strip()
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _is_whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size
