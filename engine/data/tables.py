"""CSV files as rows."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import InputError


def read_csv(path: str | Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | list[str]]]:
    """(row, {column: text}), or (row, cells) where their number is not that of the header; rows count from 0 without the header.

    InputError if the file cannot be read, or lacks one of the `needed` columns; `columns` are those that the message names.
    """
    expected = f"the columns {', '.join(columns)}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text (expected a CSV file with {expected})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    lines = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip() for name in next(lines, [])]
    lacking = [name for name in needed if name not in header]
    if lacking:
        raise InputError(f"{path}: no column {', '.join(lacking)} (expected {expected})")
    index = -1
    try:
        for cells in lines:
            if cells:
                index += 1
                yield index, dict(zip(header, cells, strict=True)) if len(cells) == len(header) else cells
    except csv.Error as error:
        raise InputError(f"{path}: row {index + 1}: {error} (expected a CSV file; rows count from 0)") from None
