"""A request, read within limits: its body, its JSON, and what its fields must be. What is wrong with it is a Refusal."""

import asyncio
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from engine.json_names import each_once

if TYPE_CHECKING:
    from starlette.requests import Request

JSON_BYTES = 2**16
BODY_SECONDS = 120.0  # for the whole of a body to arrive; the clients give up after as many
LARGEST = 2**40  # of a number that may be a coordinate


class Refusal(Exception):
    """The answer to a request that is not granted: an HTTP status, and one line."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


@contextmanager
def refused() -> Iterator[None]:
    """Inside, a ValueError is a Refusal (400): the client can mend it."""
    try:
        yield
    except ValueError as error:
        raise Refusal(400, str(error)) from None


async def read_body(request: "Request", limit: int) -> bytes:
    """The body. Refusal (413) for one that is larger or says it will be, 408 for one that does not arrive."""
    from starlette.requests import ClientDisconnect

    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > limit:
        raise Refusal(413, f"a body of {declared[:20]} bytes (expected at most {limit:,})", {"Connection": "close"})
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise Refusal(413, f"a body of more than {limit:,} bytes", {"Connection": "close"})
    except (TimeoutError, ClientDisconnect):
        raise Refusal(408, "the body has not arrived", {"Connection": "close"}) from None
    return bytes(body)


def read_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; Refusal (400) for anything else."""

    def no_number(name: str) -> NoReturn:
        raise ValueError(name)

    try:
        found = json.loads(text, object_pairs_hook=each_once, parse_constant=no_number)
    except (ValueError, RecursionError):
        raise Refusal(400, f"{what} cannot be read (expected JSON)") from None
    if not isinstance(found, dict):
        raise Refusal(400, f"{what} is not what was expected, a JSON object")
    return found


def flag(values: Mapping[str, Any], name: str, default: bool | None = None) -> bool:
    """True or false."""
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"{name}: expected true or false")
    return value


def numbers(values: Any, name: str, length: int) -> list[float]:
    """So many finite numbers."""
    if not isinstance(values, list) or len(values) != length or not all(_is_number(value) for value in values):
        raise Refusal(400, f"{name}: expected {length} numbers")
    return values


def intervals(values: Any, name: str) -> list[list[float]]:
    """[low, high] of each of three axes."""
    if not isinstance(values, list) or len(values) != 3:
        raise Refusal(400, f"{name}: expected [low, high] of each of three axes")
    return [numbers(value, name, 2) for value in values]


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value) and abs(value) <= LARGEST
