"""Where starter data lie: in a folder of the cache that is made once, by whoever needs it first."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.errors import InputError
from engine.files import cache_folder


def starter_folder(folder: str | Path | None, name: str, marker: str, build: Callable[[Path], None]) -> Path:
    """`folder`, by default `name` in the cache, filled by `build(empty folder)` unless it holds `marker` already.

    It appears whole or not at all, also when several processes make it at once. InputError where it holds something else.
    """
    folder = Path(folder) if folder else cache_folder() / name
    if (folder / marker).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        building = Path(temporary) / "building"
        building.mkdir()
        build(building)
        try:
            os.rename(building, folder)
        except OSError:  # another process was first, or the folder holds something else
            if not (folder / marker).exists():
                if folder.exists() and any(folder.iterdir()):
                    raise InputError(f"{folder}: holds files but no starter data; expected a new or empty folder") from None
                shutil.copytree(building, folder, dirs_exist_ok=True)
    return folder
