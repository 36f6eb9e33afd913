"""Files that belong together, written whole: a reader finds all of them, or not the one that says they are there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: str | Path, last: str) -> Iterator[Path]:
    """Inside, an empty folder to write files to; after it they lie in `folder`, beside what else is there, `last` after all others.

    Where writing fails, nothing has changed. A killed process leaves a hidden folder beside `folder`, which the next one clears, or
    a `folder` without `last`.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        names = sorted({file.name for file in staging.iterdir()} - {last})
        folder.mkdir(exist_ok=True)
        if names:
            (folder / last).unlink(missing_ok=True)
        for name in [*names, last]:
            os.replace(staging / name, folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
