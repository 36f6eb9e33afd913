"""Requests to one web server; a request that failed for a reason that may pass is sent again.

Redirects are not followed: a POST would lose its body, an API key would go to another server, a download would leave HTTPS. Only a
GET whose answer is checked by its hash may ask for it (`follow_redirects`), and other servers get no API key then. Bodies are asked
for uncompressed. Proxies are taken from `http_proxy`, `https_proxy` and `no_proxy`.

A user and password in the address, and what follows its question mark, are sent with each request, and stand in no message. No more
do the given headers, should the server repeat them.
"""

import base64
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from itertools import takewhile
from typing import Any, Self, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx2
from tqdm.auto import tqdm

from engine.errors import InputError
from engine.shown_text import printable, without_secrets

Result = TypeVar("Result")
TRANSIENT = {408, 409, 425, 429}  # HTTP status codes that another try may not meet again, beside 500 and above
SHORTEST_KEY = 6  # characters; what follows the question mark of an address and is shorter is no secret
LONGEST_WAIT = 60.0  # seconds that a server may ask for with Retry-After before it answers one request, all tries together


class Refused(OSError):
    """An answer that is no success, with its HTTP status."""

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


class Busy(ConnectionError):
    """An answer that asks to come back, after so many seconds where it says so."""

    def __init__(self, reason: str, seconds: float | None):
        super().__init__(reason)
        self.seconds = seconds


class HTTPSession:
    """Sends requests to the server at `url`.

    A request that gets no usable answer raises an OSError that gives the reason in one line: a ConnectionError where another try
    may succeed. `timeout`: seconds to wait for the connection, and for each next byte. `tries`: how often a request is sent at
    most. `pause`: seconds before the second try, doubled before each further one; a server may ask for more (Retry-After).
    `self.url` is the address as it may be shown.
    Threads may share a session: once its `with` block ends, also by Ctrl-C, the threads still waiting send nothing more.
    """

    def __init__(
        self, url: str, *, timeout: float = 60.0, tries: int = 4, pause: float = 1.0, headers: dict[str, str] | None = None
    ) -> None:
        parts = httpx2.URL(url)
        self.url = str(parts.copy_with(userinfo=b"", query=None, fragment=None)).rstrip("/")
        self.tries, self.pause, self.timeout, self.query = tries, pause, timeout, parts.params
        keys = [value.split(" ")[-1] for value in (headers or {}).values()]  # of `Bearer KEY`
        basic = base64.b64encode(f"{parts.username}:{parts.password}".encode()).decode()
        self.secrets = [*keys, *(value for value in self.query.values() if len(value) >= SHORTEST_KEY), parts.password, basic]
        self.reported: set[str] = set()  # reasons for another try that were printed already
        self.stopped = threading.Event()
        # httpx2 itself would also take ALL_PROXY, and fail where that is a SOCKS proxy
        proxy = None if proxy_bypass(parts.netloc.decode()) else getproxies().get(parts.scheme)
        try:
            transport = httpx2.HTTPTransport(proxy=f"http://{proxy}" if proxy and "://" not in proxy else proxy)
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise InputError(f"{parts.scheme}_proxy: {without_secrets(str(error))}") from None
        self.client = httpx2.Client(
            transport=transport,
            timeout=timeout,
            headers={"Accept-Encoding": "identity"} | (headers or {}),
            auth=(parts.username, parts.password) if parts.userinfo else None,
        )
        weakref.finalize(self, self.client.close).atexit = False  # not before the last thread has left it, if it ever does

    def __enter__(self) -> Self:
        self.stopped.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()

    def read(self, method: str, path: str, limit: int, **request: Any) -> bytes:
        """The answer's body, cut off soon after `limit` bytes. `request` as in `httpx2.Client.stream`.

        A body that is not there within five times `timeout` counts as none, though it may come byte by byte.
        """

        def attempt() -> bytes:
            latest = time.monotonic() + 5 * self.timeout
            with self.open(method, path, **request) as response:
                pieces = []
                for piece in takewhile(lambda _: response.num_bytes_downloaded <= limit, response.iter_raw()):
                    pieces.append(piece)
                    if time.monotonic() > latest:
                        raise ConnectionError(f"its answer is not complete after {5 * self.timeout:g} seconds")
                return b"".join(pieces)

        return self.with_retries(attempt)

    def hide(self, text: str) -> str:
        """The server's text on one line, without control characters and without what was sent in secret."""
        return " ".join(printable(without_secrets(" ".join(text.split()), *self.secrets)).split())

    @contextmanager
    def open(self, method: str, path: str, **request: Any) -> Iterator[httpx2.Response]:
        """Send one request, once; gives the answer, whose body is still to be read."""
        try:
            request["params"] = self.query.merge(request.get("params", {}))
            with self.client.stream(method, self.url + path, **request) as response:
                if not response.is_success:
                    raise self._refusal(response)
                yield response
        except httpx2.RequestError as error:
            raise ConnectionError(self.hide(str(error)) or type(error).__name__) from None

    def _refusal(self, response: httpx2.Response) -> OSError:
        status, location = response.status_code, response.headers.get("Location", "")
        body = next(response.iter_raw(), b"")[:10_000].decode(errors="replace")
        text = f"to {location}" if "://" in location else re.sub(r"<[^>]*>", " ", body)
        reason = f"HTTP {status} {self.hide(text)[:200] or self.hide(response.reason_phrase)}"
        if status in TRANSIENT or status >= 500:
            return Busy(reason, retry_after(response.headers.get("Retry-After", "")))
        return Refused(reason, status)

    def with_retries(self, attempt: Callable[[], Result]) -> Result:
        """`attempt()`, called again after a pause where it raises a ConnectionError; each reason is printed once."""
        asked = 0.0
        for number in range(1, self.tries + 1):
            pause = self.pause * 2 ** (number - 1)
            try:
                return attempt()
            except ConnectionError as error:
                if number == self.tries or self.stopped.is_set():  # what is wrong was said, of another request
                    raise
                seconds = error.seconds if isinstance(error, Busy) else None
                if seconds is not None:
                    pause, asked = max(seconds, pause), asked + seconds
                    if asked >= LONGEST_WAIT:
                        raise OSError(f"{error} (come back in {seconds:.0f} s)") from None
                if str(error) not in self.reported:
                    self.reported.add(str(error))
                    tqdm.write(f"{self.url}: {error}; trying again", file=sys.stderr)
            if self.stopped.wait(pause):
                raise OSError("another request failed")
        raise ValueError(f"tries is at least 1, not {self.tries}")


def retry_after(header: str) -> float | None:
    """The seconds that a Retry-After header names, as a number or as a date; None where it names none."""
    if re.fullmatch(r"\s*\d{1,9}\s*", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def shown_address(url: str) -> str:
    """An address without user, password and keys, whether or not requests can be sent there."""
    return without_secrets(re.sub(r"^(\w+://)?.*@", r"\1***@", url))


def is_web_address(url: str) -> bool:
    """Whether requests can be sent there."""
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return parts.scheme in ("http", "https") and parts.host != "" and (parts.port or 80) < 2**16
