"""Requests to one web server; a request that failed for a reason that may pass is sent again.

Redirects are not followed: a POST would lose its body, an API key would go to another server, a download would leave HTTPS. Bodies
are asked for uncompressed. Proxies are taken from `http_proxy`, `https_proxy` and `no_proxy`.
"""

import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Self, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx2
from tqdm.auto import tqdm

from engine.errors import InputError

Result = TypeVar("Result")
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP status codes that another try may not meet again


class HTTPSession:
    """Sends requests to the server at `url`.

    A request that gets no usable answer raises an OSError that gives the reason in one line: a ConnectionError where another try
    may succeed. `timeout`: seconds to wait for the connection, and for each next byte. `tries`: how often a request is sent at
    most. `pause`: seconds before the second try, doubled before each further one.
    Threads may share a session: once its `with` block ends, also by Ctrl-C, the threads still waiting send nothing more.
    """

    def __init__(
        self, url: str, *, timeout: float = 60.0, tries: int = 4, pause: float = 1.0, headers: dict[str, str] | None = None
    ) -> None:
        self.url, self.tries, self.pause = url.rstrip("/"), tries, pause
        self.reported: set[str] = set()  # reasons for another try that were printed already
        self.stopped = threading.Event()
        parts = httpx2.URL(url)  # httpx2 itself would also take ALL_PROXY, and fail where that is a SOCKS proxy
        proxy = None if proxy_bypass(parts.netloc.decode()) else getproxies().get(parts.scheme)
        try:
            transport = httpx2.HTTPTransport(proxy=f"http://{proxy}" if proxy and "://" not in proxy else proxy)
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise InputError(f"{parts.scheme}_proxy: {error}") from None
        self.client = httpx2.Client(transport=transport, timeout=timeout, headers={"Accept-Encoding": "identity"} | (headers or {}))
        weakref.finalize(self, self.client.close)  # not before the last thread has left it

    def __enter__(self) -> Self:
        self.stopped.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()

    def read(self, method: str, path: str, limit: int, **request: Any) -> bytes:
        """The answer's body, cut off soon after `limit` bytes. `request` as in `httpx2.Client.stream`."""

        def attempt() -> bytes:
            with self.open(method, path, **request) as response:
                return b"".join(takewhile(lambda _: response.num_bytes_downloaded <= limit, response.iter_raw()))

        return self.with_retries(attempt)

    @contextmanager
    def open(self, method: str, path: str, **request: Any) -> Iterator[httpx2.Response]:
        """Send one request, once; gives the answer, whose body is still to be read."""
        try:
            with self.client.stream(method, self.url + path, **request) as response:
                if not response.is_success:
                    location, body = response.headers.get("Location", ""), next(response.iter_raw(), b"").decode(errors="replace")
                    text = f"to {location}" if "://" in location else re.sub(r"<[^>]*>", " ", body)
                    reason = f"HTTP {response.status_code} {' '.join(text.split())[:200] or response.reason_phrase}"
                    raise (ConnectionError if response.status_code in TRANSIENT else OSError)(reason)
                yield response
        except httpx2.RequestError as error:
            raise ConnectionError(str(error) or type(error).__name__) from None

    def with_retries(self, attempt: Callable[[], Result]) -> Result:
        """`attempt()`, called again after a pause where it raises a ConnectionError; each reason is printed once."""
        for number in range(1, self.tries + 1):
            try:
                return attempt()
            except ConnectionError as error:
                if number == self.tries:
                    raise
                if str(error) not in self.reported:
                    self.reported.add(str(error))
                    tqdm.write(f"{self.url}: {error}; trying again", file=sys.stderr)
            if self.stopped.wait(self.pause * 2 ** (number - 1)):
                raise OSError("another request failed")
        raise ValueError(f"tries is at least 1, not {self.tries}")


def is_web_address(url: str) -> bool:
    """Whether requests can be sent there."""
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return parts.scheme in ("http", "https") and parts.host != "" and (parts.port or 80) < 2**16
