"""CSV and its kin as rows: separated by commas, tabs, semicolons or bars, as the header shows."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.formats.folders import ending
from engine.data.formats.text import read_text
from engine.data.rows import BadRow
from engine.errors import InputError

SEPARATORS = (",", "\t", ";", "|")
QUOTES = 'a cell with quotes in it between quotes, and its own ones doubled: "a ""b"" c"'


class TableRow(NamedTuple):
    """`number` counts from 0 without the header; `line`, where it begins, from 1. A BadRow stands for cells that are no row."""

    number: int
    line: int
    cells: dict[str, str] | BadRow


def read_csv(path: str | Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[TableRow]:
    """The rows of a table. Columns are found by name in any case, and bear the names of `columns`, which messages list.

    InputError if the file cannot be read, or lacks one of the `needed` columns.
    """
    expected = f"the columns {', '.join(columns)}"
    header, rows = open_table(path, f"a CSV file with {expected}", columns)
    lacking = [name for name in needed if name not in header]
    if lacking:
        raise InputError(f"{path}: no column {', '.join(lacking)} (expected {expected})")
    return rows


def open_table(path: str | Path, expected: str, columns: Sequence[str] = ()) -> tuple[list[str], Iterator[TableRow]]:
    """(its columns, its rows). `columns` are names that the header may spell in another case; unnamed ones are left out."""
    text = read_text(path, expected)
    told = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel's own first line
    text = text[told.end() :] if told else text
    separator = told[1] if told else _separator(text, "," if ending(Path(path)) == ".csv" else "\t")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        named = [name.strip() for name in next(lines, [])]
    except csv.Error as error:
        raise InputError(f"{path}: its first line is no header: {error} (expected {expected})") from None
    spelled = {name.casefold(): name for name in columns}
    header = [spelled.get(name.casefold(), name) for name in named]
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise InputError(f"{path}: two columns {twice[0]!r} (expected each once)")
    return [name for name in header if name], _read_rows(str(path), lines, header, 1 if told else 0)


def _separator(text: str, usual: str) -> str:
    """The one by which the header has most columns."""

    def width(separator: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), []))
        except csv.Error:
            return 0

    return max((usual, *SEPARATORS), key=width)


def _read_rows(name: str, lines: Any, header: list[str], lines_before: int) -> Iterator[TableRow]:
    index, width = 0, len(header)
    while True:
        line = lines.line_num + lines_before + 1
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise InputError(
                    f"{name}: line {line}: a quote opens in this row and is never closed (expected {QUOTES})"
                ) from None
            yield TableRow(index, line, BadRow(str(error), QUOTES))
            index += 1
            continue
        if not cells:  # an empty line
            continue
        if len(cells) < width or any(cell.strip() for cell in cells[width:]):
            expected = f"{width}, as the header has: text with a separator in it stands in double quotes"
            yield TableRow(index, line, BadRow(f"{len(cells)} cells", expected))
        else:
            yield TableRow(index, line, {key: cell for key, cell in zip(header, cells, strict=False) if key})
        index += 1
