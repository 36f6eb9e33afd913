"""Files written whole: under a temporary name in the same folder, then renamed, so a reader never sees half of one."""

import json
import os
from pathlib import Path


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


def write_json(path: str | Path, data) -> Path:
    """`write_whole` of `data` as indented JSON."""
    return write_whole(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def cache_folder() -> Path:
    """Where derived data may be kept: `VESALIUS_CACHE`, by default `~/.cache/vesalius`."""
    return Path(os.environ.get("VESALIUS_CACHE") or Path.home() / ".cache" / "vesalius")
