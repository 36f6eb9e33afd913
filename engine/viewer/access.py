"""Who is answered: whoever has the key or, where there is none, programs of this machine."""

import ipaddress
import secrets
from typing import Any


def is_loopback(host: str) -> bool:
    """Whether an address, or `localhost`, is that of this machine to itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Access:
    """Around an ASGI application. Without a key, requests that name another host are refused: a page of the web, shown by a browser
    on this machine, could otherwise ask in its user's name."""

    def __init__(self, app: Any, api_key: str | None):
        self.app, self.key = app, None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer = self._refusal(scope) if scope["type"] == "http" else None
        await (answer or self.app)(scope, receive, send)

    def _refusal(self, scope: Any) -> Any:
        from starlette.responses import JSONResponse

        headers = dict(scope["headers"])
        if self.key is None:
            origin = headers.get(b"origin", b"http://localhost").partition(b"://")[2]
            if not all(is_loopback(_name(host)) for host in (headers.get(b"host", b""), origin)):
                return JSONResponse({"detail": "this server answers to this machine only"}, 421)
        elif scope["path"] != "/healthz" and not secrets.compare_digest(headers.get(b"authorization", b""), self.key):
            return JSONResponse({"detail": "expected the header Authorization: Bearer KEY"}, 401)
        return None


def _name(host: bytes) -> str:
    """Of `name`, `name:port` and `[address]:port`."""
    text = host.decode("latin-1")
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
