"""Files written whole: under a temporary name in the same folder, then renamed, so that no reader sees half a file."""

import json
import math
import os
from enum import Enum
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write text (UTF-8) or bytes to `path` in one step; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, data: Any) -> Path:
    """`write_whole` of `data` as indented JSON."""
    return write_whole(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def plain(value: Any, digits: int | None = None) -> Any:
    """`value` in JSON's own types: tensors and NumPy numbers as numbers, non-finite ones as None, the rest by `str`.

    With `digits`, floats keep that many significant digits.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item, digits) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), digits)
    if isinstance(value, Enum):
        return plain(value.value, digits)
    if isinstance(value, float):
        return (float(f"{value:.{digits}g}") if digits else value) if math.isfinite(value) else None
    return value if value is None or type(value) in (bool, int, str) else str(value)


def cache_folder() -> Path:
    """Where derived data may be kept: `VESALIUS_CACHE`, by default `~/.cache/vesalius`."""
    return Path(os.environ.get("VESALIUS_CACHE") or Path.home() / ".cache" / "vesalius")
