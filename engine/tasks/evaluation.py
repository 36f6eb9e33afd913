"""What came of asking about every row of a data set, in one form for all tasks; as a file, and as what a report shows."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.files import plain, write_json
from engine.report.content import Cell, Comparison, Table
from engine.shown_text import spreadsheet_cell

Columns = dict[str, Cell]


@dataclass(frozen=True)
class Evaluation:
    """A share is the dictionary of `Score.as_dict`. `{}` after a name says what its keys are.

    results     one entry a row, in the rows' order; `correct` where right and wrong have a meaning, and the first share counts it
    headline    {name} the numbers of the command's last line
    measures    {name} what is compared before and after training: shares or numbers
    notes       {measure} a line below it in the report
    baselines   {name} what the data alone reach
    tables      {title: {line: {column}}} the measures of groups of rows
    details     {name: {line}} what follows the headline
    summary     {name} what the file begins with
    """

    results: list[dict[str, Any]]
    headline: Columns
    measures: Columns
    notes: dict[str, str] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    tables: dict[str, dict[str, Columns]] = field(default_factory=dict)
    details: dict[str, Columns] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as JSON: the summary, then the results, then what only `read` needs."""
        results = [{key: value for key, value in result.items() if not key.startswith("_")} for result in self.results]
        rest = {name: getattr(self, name) for name in ("headline", "measures", "notes", "baselines", "tables", "details")}
        write_json(path, plain({**self.summary, "results": results, "shown": rest}))

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """What `write` wrote."""
        summary = json.loads(path.read_text(encoding="utf-8"))
        results, shown = summary.pop("results"), summary.pop("shown")
        return cls(results, summary=summary, **shown)


def comparisons(evaluations: Mapping[str, Evaluation]) -> list[Comparison]:
    """One a measure, over evaluations of the same rows by the time or the condition of each, in their order."""
    first, last = list(evaluations.values())[0], list(evaluations.values())[-1]
    counted = next((name for name, cell in first.measures.items() if isinstance(cell, dict)), None)
    fixed = broken = None
    if len(evaluations) > 1 and len(first.results) == len(last.results) and all("correct" in r for r in first.results):
        pairs = [(a["correct"], b["correct"]) for a, b in zip(first.results, last.results, strict=True)]
        fixed, broken = pairs.count((False, True)), pairs.count((True, False))
    return [
        Comparison(
            name,
            {when: evaluation.measures[name] for when, evaluation in evaluations.items()},
            {when: evaluation.notes[name] for when, evaluation in evaluations.items() if name in evaluation.notes},
            fixed if name == counted else None,
            broken if name == counted else None,
        )
        for name in first.measures
    ]


def tables(evaluations: Mapping[str, Evaluation]) -> list[Table]:
    """Tables of one column have a column an evaluation here, larger ones become one table an evaluation.

    A table of one line is left out: it does not tell rows apart.
    """
    shown = []
    first = next(iter(evaluations.values()))
    for title, of_first in first.tables.items():
        columns = list(next(iter(of_first.values()), {}))
        lines = list(dict.fromkeys(line for evaluation in evaluations.values() for line in evaluation.tables.get(title, {})))
        if len(lines) < 2:
            continue
        if len(columns) == 1:
            cells = {
                line: [evaluation.tables.get(title, {}).get(line, {}).get(columns[0]) for evaluation in evaluations.values()]
                for line in lines
            }
            shown.append(Table(f"{columns[0]} by {title}", list(evaluations), cells))
            continue
        for when, evaluation in evaluations.items():
            cells = {line: list(values.values()) for line, values in evaluation.tables[title].items()}
            shown.append(Table(f"measures by {title}, {when}", columns, cells))
    return shown


def table_csv(first: str, table: Mapping[str, Mapping[str, Any]]) -> str:
    """{line: {column}} as CSV; `first` heads the lines' names, and a column that a line lacks is empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    columns = list(dict.fromkeys(column for line in table.values() for column in line))
    writer.writerow([first, *columns])
    writer.writerows(map(spreadsheet_cell, [name, *map(line.get, columns)]) for name, line in table.items())
    return text.getvalue()


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced."""
    return list(items) if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def instructive(results: Sequence[Mapping[str, Any]], count: int = 12) -> list[int]:
    """The places of a few results: two that are not `correct` for each that is, spread over the set."""
    right = [i for i, result in enumerate(results) if result["correct"]]
    wrong = [i for i, result in enumerate(results) if not result["correct"]]
    num_right = min(len(right), max(count // 3, count - len(wrong)))
    return spread(wrong, count - num_right) + spread(right, num_right)
