"""A request, read within limits. What is wrong with it is a Refusal."""

import asyncio
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from engine.json_names import each_once

JSON_BYTES = 2**16
BODY_SECONDS = 120.0  # for a body to arrive; the clients give up after as many
LARGEST = 2**40  # of a number that may be a coordinate


class Refusal(Exception):
    """The answer to a request that is not granted: an HTTP status, and one line."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


@contextmanager
def refused() -> Iterator[None]:
    """Inside, a ValueError is a Refusal (400)."""
    try:
        yield
    except ValueError as error:
        raise Refusal(400, str(error)) from None


async def read_body(request: Any, limit: int) -> bytes:
    """The body. Refusal (413) of one that is, or says it will be, larger; 408 of one that does not arrive."""
    from starlette.requests import ClientDisconnect

    declared, body = request.headers.get("content-length", "0"), bytearray()
    too_large = Refusal(413, f"a body of more than {limit:,} bytes", {"Connection": "close"})
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > limit:
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except (TimeoutError, ClientDisconnect):
        raise Refusal(408, "the body has not arrived", {"Connection": "close"}) from None
    return bytes(body)


def read_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; Refusal (400) of anything else."""
    try:
        found = json.loads(text, object_pairs_hook=each_once)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refusal(400, f"{what} cannot be read (expected a JSON object)")
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
    return type(value) in (int, float) and (type(value) is int or math.isfinite(value)) and abs(value) <= LARGEST
