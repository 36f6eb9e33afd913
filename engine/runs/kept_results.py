"""Results of an evaluation that is not at its end, so that a killed one goes on where it stopped: a line of JSON a row.

The first line says what was asked of which model; a file that says anything else is begun anew.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import processes
from engine.data.rows import Rows
from engine.files import plain
from engine.training.manifest import row_identity


class KeptResults:
    """What this process knows of the rows: `identity`; `results` {place: result}; `add` keeps more; `forget` when all is there."""

    def __init__(self, folder: Path, asked: Mapping[str, Any], rows: Rows, model: str) -> None:
        """`asked`: whatever decides the answers; `model`: its name, or its folder, whose files are known by size and time."""
        self.identity = row_identity(rows)
        told = [asked, self.identity, model, _files_of(model), os.environ.get("WORLD_SIZE", "1")]
        text = json.dumps(plain(told), sort_keys=True)
        self.head = json.dumps({"asked": hashlib.sha256(text.encode()).hexdigest()}) + "\n"
        self.path = folder / f".results_{processes.rank()}.jsonl"
        self.results: dict[int, dict[str, Any]] = {}
        lines = []
        with contextlib.suppress(OSError):
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        if lines and lines[0] + "\n" == self.head:
            for line in lines[1:]:
                with contextlib.suppress(ValueError, TypeError, KeyError):  # cut by the kill
                    row = json.loads(line)
                    self.results[row["place"]] = row["result"]
        self.add({})

    def add(self, results: Mapping[int, dict[str, Any]]) -> None:
        """Keep the results of these rows; they are on their way to the disk when this returns."""
        mode, rows = ("a", results) if results else ("w", self.results)  # begun anew: whole lines only
        # Where it cannot be kept, on a full disk or for a result that is not JSON, it will be asked again.
        with contextlib.suppress(OSError, TypeError, ValueError, AttributeError):
            lines = "".join(map(self._line, rows.items()))
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(lines if results else self.head + lines)

    @staticmethod
    def _line(item: tuple[int, dict[str, Any]]) -> str:
        return json.dumps({"place": item[0], "result": item[1]}, default=lambda value: value.tolist()) + "\n"

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()


def _files_of(model: str) -> list[tuple[str, int, int]]:
    files: list[tuple[str, int, int]] = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(model).rglob("*")) if Path(model).is_dir() else []:
            if path.is_file():
                files.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return files
