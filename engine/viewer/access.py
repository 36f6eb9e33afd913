"""Who is answered: whoever has the key, or, where there is none, programs of this machine."""

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN = ("/healthz",)
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether an address, or `localhost`, is that of this machine to itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Access:
    """Around an ASGI application. Without a key, what names another host than this one is refused too: a page of the web that a
    browser on this machine shows could otherwise ask in its user's name."""

    def __init__(self, app: App, api_key: str | None):
        self.app, self.key = app, None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        answer = self._refusal(scope) if scope["type"] == "http" else None
        await (answer or self.app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> App | None:
        from starlette.responses import JSONResponse

        headers = {name: value for name, value in scope["headers"] if name in (b"host", b"origin", b"authorization")}
        if self.key is None:
            origin = headers.get(b"origin", b"http://localhost").partition(b"://")[2]
            if not all(is_loopback(_name(host)) for host in (headers.get(b"host", b""), origin)):
                return JSONResponse({"detail": "this server answers to this machine only"}, 421)
        elif scope["path"] not in OPEN and not secrets.compare_digest(headers.get(b"authorization", b""), self.key):
            return JSONResponse({"detail": "expected the header Authorization: Bearer KEY"}, 401)
        return None


def _name(host: bytes) -> str:
    """Of `name`, `name:port` and `[address]:port`."""
    text = host.decode("latin-1")
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
