"""A public S3 bucket over HTTPS: what it lists, as files to fetch.

An ETag of 32 hex digits is the MD5 of a file's content.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from engine.download.remote_files import RemoteFile, fetch, is_safe_name
from engine.errors import InputError
from engine.http_session import HTTPSession, is_web_address, shown_address
from engine.progress import progress

PAUSE = 1.0  # seconds, see HTTPSession
LONGEST_LISTING = 2**24  # bytes of a page of 1,000 names
MOST_PAGES = 2_000


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
        name = key.removeprefix(self.prefix)
        if not key.startswith(self.prefix) or not is_safe_name(name):
            raise InputError(f"{self.shown}: lists {key[:80]!r} (expected names that stay inside a folder)")
        # a file that was uploaded in parts has another hash as its ETag
        digest = ("md5", etag) if re.fullmatch(r"[0-9a-f]{32}", etag) else None
        return RemoteFile(name, f"/{quote(key)}", int(size), digest, {"If-Match": f'"{etag}"'})

    def fetch(self, files: list[RemoteFile], folder: str | Path, **options: Any) -> dict[str, int]:
        """`engine.download.remote_files.fetch` of files that this bucket lists."""
        return fetch(files, folder, HTTPSession(self.url, pause=PAUSE), **options)
