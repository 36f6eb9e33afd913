"""Requests to one web server, each tried again where its failure may pass.

No redirect is followed: a question would lose its body, a key go elsewhere, a download leave HTTPS. Bodies come as they are kept,
not compressed for the way. The proxies are those of `http_proxy`, `https_proxy` and `no_proxy`.
"""

import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from urllib.request import getproxies, proxy_bypass

import httpx2
from tqdm.auto import tqdm

from engine.errors import InputError

PASSING = {408, 409, 425, 429, 500, 502, 503, 504}


class HTTPSession:
    """Asks the server at `url`. No answer is an OSError with its reason in one line, a ConnectionError where that may pass.

    `timeout`: seconds to connect, and without a byte. `pause`: seconds before the second of `tries`, doubled before each further
    one. Threads may share a session; when its `with` block is left, also by Ctrl-C, those still in it make no further try.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, tries: int = 4, pause: float = 1.0, headers: dict | None = None):
        self.url, self.tries, self.pause, self.told, self.stopped = url.rstrip("/"), tries, pause, set(), threading.Event()
        parts = httpx2.URL(url)  # httpx2 itself would also take ALL_PROXY, and fail where that is a SOCKS proxy
        proxy = None if proxy_bypass(parts.netloc.decode()) else getproxies().get(parts.scheme)
        try:
            transport = httpx2.HTTPTransport(proxy=f"http://{proxy}" if proxy and "://" not in proxy else proxy)
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise InputError(f"{parts.scheme}_proxy: {error}") from None
        self.client = httpx2.Client(transport=transport, timeout=timeout, headers={"Accept-Encoding": "identity"} | (headers or {}))
        weakref.finalize(self, self.client.close)  # not before the last thread has left it

    def __enter__(self):
        self.stopped.clear()
        return self

    def __exit__(self, *_):
        self.stopped.set()

    def read(self, method: str, path: str, limit: int, **request) -> bytes:
        """The answer, cut off where it passes `limit` bytes. `request` as in `httpx2.Client.stream`."""

        def attempt() -> bytes:
            with self.open(method, path, **request) as response:
                return b"".join(takewhile(lambda _: response.num_bytes_downloaded <= limit, response.iter_raw()))

        return self.patiently(attempt)

    @contextmanager
    def open(self, method: str, path: str, **request) -> Iterator[httpx2.Response]:
        """An answer whose body is still to be read, in one try."""
        try:
            with self.client.stream(method, self.url + path, **request) as response:
                if not response.is_success:
                    to, body = response.headers.get("Location", ""), next(response.iter_raw(), b"").decode(errors="replace")
                    said = f"to {to}" if "://" in to else re.sub(r"<[^>]*>", " ", body)
                    reason = f"HTTP {response.status_code} {' '.join(said.split())[:200] or response.reason_phrase}"
                    raise (ConnectionError if response.status_code in PASSING else OSError)(reason)
                yield response
        except httpx2.RequestError as error:
            raise ConnectionError(str(error) or type(error).__name__) from None

    def patiently(self, attempt: Callable):
        """`attempt()`, made again after a pause where it raises a ConnectionError; each reason for that is told once."""
        for number in range(1, self.tries + 1):
            try:
                return attempt()
            except ConnectionError as error:
                if number == self.tries:
                    raise
                if str(error) not in self.told:
                    self.told.add(str(error))
                    tqdm.write(f"{self.url}: {error}; trying again", file=sys.stderr)
            if self.stopped.wait(self.pause * 2 ** (number - 1)):
                raise OSError("another request failed")


def is_web_address(url: str) -> bool:
    """Whether requests can be sent there."""
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return parts.scheme in ("http", "https") and parts.host != "" and (parts.port or 80) < 2**16
