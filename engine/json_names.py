"""Names in a JSON object: Python's reader keeps the last of two values under one name, and says nothing of the first."""

from collections.abc import Hashable, Iterable
from typing import Any


def named_twice(names: Iterable[Hashable]) -> str | None:
    """The first name that is there a second time, short and quoted as a message shows it; None where each is there once."""
    seen = set()
    for name in names:
        if name in seen:
            return ascii(name)[:40]
        seen.add(name)
    return None


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=each_once)`: the object, or ValueError where a name is given twice."""
    if twice := named_twice(name for name, _ in pairs):
        raise ValueError(f"{twice} is given twice")
    return dict(pairs)
