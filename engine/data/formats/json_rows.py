"""The rows of a JSON file: an array, or an object a line, whichever it holds and whatever its name ends in."""

import json
from pathlib import Path
from typing import Any

from engine.data.formats.text import read_text
from engine.data.rows import BadRow
from engine.errors import InputError
from engine.json_names import named_twice


def read_json_rows(path: Path, expected: str, key: str | None = None) -> list[Any]:
    """The rows, unchecked; a broken line stands there as text, and a BadRow for an object that has a name twice, at whatever depth.

    InputError if the file is no such file of rows.

    With `key`, the array may also be what an object, the whole file, has under it.
    """
    text = read_text(path, expected)
    if not text.strip():
        raise InputError(f"{path}: the file is empty (expected {expected})")
    lines = ".jsonl" in [ending.lower() for ending in path.suffixes]
    try:
        whole = json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        if not lines and error.msg != "Extra data":  # after a first whole object others may follow
            raise InputError(f"{path}: not JSON: {error} (expected {expected})") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; brackets in brackets
        if not lines:
            raise InputError(f"{path}: not JSON: {error} (expected {expected})") from None
    else:
        if isinstance(whole, BadRow):  # of a whole file, or of the only row
            return [whole]
        if key is not None and isinstance(whole, dict):
            whole = whole.get(key, whole)
        if isinstance(whole, list):
            return whole
        if not lines and not (isinstance(whole, dict) and {"problem", "question"} & whole.keys()):  # else a single row
            raise InputError(f"{path}: a JSON {type(whole).__name__}, not an array of rows (expected {expected})")
        return [whole]
    rows = [_read_line(line) for line in text.split("\n") if line.strip()]
    if all(isinstance(row, str) for row in rows):
        raise InputError(f"{path}: no line of it is JSON (expected {expected})")
    return rows


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadRow:
    if twice := named_twice(name for name, _ in pairs):
        return BadRow(f"{twice} is there twice", "each name once")
    return next((value for _, value in pairs if isinstance(value, BadRow)), dict(pairs))


def _read_line(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        return line
