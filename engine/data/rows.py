"""Rows of a data set, checked when it is loaded: their text is in memory, their images open when a row is asked for.

A row that cannot be used is one line, `FILE: row N: reason (expected ...; rows count from 0)`: an InputError, or an entry of
`Rows.skipped`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from engine.errors import InputError

Handle = TypeVar("Handle")


class BadRow(Exception):
    """Why a row cannot be used, and what was expected; `missing_image` is the file that is not there, if that is why."""

    def __init__(self, reason: str, expected: str, missing_image: str | None = None) -> None:
        super().__init__(reason, expected)
        self.reason, self.expected, self.missing_image = reason, expected, missing_image


class SkippedRow(str):
    """The line of a bad row. `missing_image` is the file that is not there, if that is the reason."""

    missing_image: str | None = None


class BadRows:
    """Meets the bad rows of a file or folder: by `on_bad_row`, the first is an InputError ("error"), or all are kept ("skip")."""

    def __init__(self, on_bad_row: str) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is 'error' or 'skip', not {on_bad_row!r}")
        self.stops = on_bad_row == "error"
        self._lines: dict[tuple[str, int], SkippedRow] = {}

    def add(self, source: str | Path, row: int, bad: BadRow, at_line: int | None = None) -> None:
        """Row `row` of the file `source` is bad; it begins at a line. InputError where the first such row ends the loading."""
        place = f"row {row}" if at_line is None else f"row {row}, line {at_line}"
        line = SkippedRow(f"{source}: {place}: {bad.reason} (expected {bad.expected}; rows count from 0)")
        line.missing_image = bad.missing_image
        if self.stops:
            raise InputError(line) from None
        self._lines[str(source), row] = line

    def __len__(self) -> int:
        return len(self._lines)

    def lines(self) -> list[SkippedRow]:
        """The kept lines in the order of files and rows."""
        return [self._lines[place] for place in sorted(self._lines)]


def evenly_spread(count: int, limit: int | None) -> list[int]:
    """What `--limit` and `--eval_limit` take of `count` rows: at most `limit`, at equal distances from the first on, in order.

    Files are often sorted (by modality, set or diagnosis), so that the first rows alone would be of one kind.
    """
    taken = count if limit is None else min(limit, count)
    return [i * count // taken for i in range(taken)]


class Rows(Generic[Handle]):
    """Checked rows: `records[i]` is the text of row i, `handles[i]` what opens its images; `skipped` are the lines of bad rows.

    `rows[i]` is the record with what `open` adds to it. A subclass says how a handle is opened.
    """

    def __init__(self, records: Sequence[dict], handles: Sequence[Handle], skipped: Sequence[SkippedRow] = ()) -> None:
        if len(records) != len(handles):
            raise ValueError(f"{len(records)} records but images for {len(handles)}")
        self.records, self.handles, self.skipped = list(records), list(handles), list(skipped)

    def open(self, handle: Handle) -> dict[str, Any]:
        """The images of a row by their names; ImageError if a file has changed or gone since it was checked."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row with its images opened; ImageError as `open` raises it."""
        return {**self.records[index], **self.open(self.handles[index])}

    def undecoded(self, index: int) -> dict[str, Any]:
        """The same, but plain image files may be `engine.data.loaders.undecoded.Undecoded`."""
        return self[index]

    def record(self, index: int) -> dict[str, Any]:
        """The row without its images: no file is touched."""
        return dict(self.records[index])

    def select(self, indices: Iterable[int]) -> Self:
        """The rows of `indices`, in their order."""
        chosen = list(indices)
        return type(self)([self.records[i] for i in chosen], [self.handles[i] for i in chosen], self.skipped)
