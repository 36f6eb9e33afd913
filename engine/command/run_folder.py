"""The folder that a run writes: runs/<recipe>/<YYYYmmdd-HHMMSS>/.

config.json, metrics.jsonl (one line a step), checkpoints, curves.png, report.html
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import peers, processes
from engine.command.run_lock import lock_folder
from engine.errors import InputError
from engine.files import as_json, json_line, plain, write_whole
from engine.shown_text import without_secrets


class RunFolder:
    """The folder of one run. Every process knows `path`; only the first one writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.writes = processes.rank() == 0
        self.unlock: Callable[[], Any] = lambda: None  # lets other processes' runs write here

    def write_json(self, name: str, data: Any) -> None:
        """Write `data` whole as `name`; what JSON has no word for becomes its `str`, and non-finite numbers null.

        Addresses lose user, password and keys.
        """
        if self.writes:
            write_whole(self.path / name, without_secrets(as_json(plain(data))))

    def append_metrics(self, row: dict) -> None:
        """Add one line to metrics.jsonl; it is on its way to the disk when this returns."""
        if self.writes:
            try:
                with open(self.path / "metrics.jsonl", "ab") as file:
                    file.write(json_line(row))
            except OSError as error:  # a full disk is told of without a name
                error.filename = str(self.path / "metrics.jsonl")
                raise

    def read_metrics(self) -> list[dict]:
        """The rows of metrics.jsonl in order. A last line cut short by a kill is left out."""
        return self._read("metrics.jsonl")

    def _read(self, name: str) -> list[dict]:
        path = self.path / name
        rows = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            with contextlib.suppress(ValueError):  # cut short, perhaps within a letter
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def truncate(self, step: int) -> None:
        """Drop the rows of `step` and later in metrics.jsonl and completions.jsonl: a run whose first step this is writes them
        again. So does one that was killed before it saved anything, and starts anew."""
        for name in ("metrics.jsonl", "completions.jsonl"):
            if self.writes and (self.path / name).exists():
                kept = [json_line(row) for row in self._read(name) if row.get("step", 0) < step]
                write_whole(self.path / name, b"".join(kept))


def open_run(recipe: str, output_dir: str | Path | None = None) -> RunFolder:
    """Make the run folder: `output_dir`, or else a new `runs/<recipe>/<YYYYmmdd-HHMMSS>`, the same one in every process.

    InputError where another run is writing there.
    """
    processes.join()
    peers.watch()
    path = Path(output_dir or processes.broadcast_from_first(_new_folder, Path("runs") / recipe))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be the output folder ({error.strerror})") from None
    run = RunFolder(path)
    if refusal := processes.broadcast_from_first(lambda: lock_folder(path, run) if run.writes else None):
        raise InputError(refusal)
    return run


def _new_folder(parent: Path) -> str:
    while True:
        path = parent / time.strftime("%Y%m%d-%H%M%S")
        try:
            path.mkdir(parents=True)
            return str(path)
        except FileExistsError:  # another run started within this second
            time.sleep(0.2)


def newest_output(recipe: str, marker: str) -> Path:
    """The folder of the newest file `marker` among the runs of a recipe; InputError where it has not run here."""
    runs = Path("runs", recipe)
    found = sorted([*runs.glob(f"*/{marker}"), *runs.glob(f"*/*/{marker}")], key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise InputError(
            f"--model is missing: a checkpoint folder (python -m recipes.{recipe} makes one; none is in runs/{recipe})"
        )
    return found[-1].parent
