"""Comparisons and tables, as the page's template wants them: every number written out, shares in percent with their interval."""

from collections.abc import Sequence
from typing import Any

from engine.files import plain
from engine.report.content import Cell, Comparison, Share, Table
from engine.report.numbers import heading, scale_of, value_of, words


def shown_comparison(comparison: Comparison) -> dict[str, Any]:
    """Its values in the order of time, and what was gained from the first to the last."""
    values: dict[str, Cell] = {when: plain(cell) for when, cell in comparison.values.items()}
    scale = scale_of(comparison.name, values.values())
    first, last = next(iter(values.values()), None), list(values.values())[-1] if values else None
    a, b = value_of(first), value_of(last)
    return {
        "name": heading(comparison.name),
        "values": [
            {
                "when": when,
                "text": scale.text(cell),
                "unit": "%" if scale.percent and value_of(cell) is not None else "",
                "interval": _interval(cell, 1) if isinstance(cell, dict) else None,
                "note": comparison.notes.get(when),
            }
            for when, cell in values.items()
        ],
        "gain": scale.gain(first, last) if len(values) > 1 else None,
        "direction": "" if a is None or b is None or a == b else "up" if b > a else "down",
        "fixed": comparison.fixed,
        "broken": comparison.broken,
        "num_samples": last["num_samples"] if isinstance(last, dict) else None,
    }


def shown_table(table: Table) -> dict[str, Any]:
    """Lines of cells, each with its text; where there are shares, also their places on the axis (in percent)."""
    lines: dict[str, list[Cell]] = {name: [plain(cell) for cell in cells] for name, cells in table.lines.items()}
    columns = [_column(name, [cells[i] for cells in lines.values()]) for i, name in enumerate(table.columns)]
    shares = [i for i, column in enumerate(columns) if column["share"]]
    for order, i in enumerate(shares):  # from the first, a grey ring, to the last, a blue dot
        columns[i]["mark"] = 100 * order // (len(shares) - 1) if len(shares) > 1 else 100
    return {
        "title": heading(table.title),
        "columns": columns,
        "bare": len(shares) == len(columns),  # nothing but shares: the page has room to say of how many questions
        "lines": [
            {
                "name": name,
                "count": next((cell["num_samples"] for cell in cells if isinstance(cell, dict)), None),
                "marks": [(columns[i]["mark"], _place(cells[i])) for i in shares],
                "cells": [
                    {"text": column["texts"][number], "interval": _interval(cell, 0) if isinstance(cell, dict) else None}
                    for column, cell in zip(columns, cells, strict=True)
                ],
            }
            for number, (name, cells) in enumerate(lines.items())
        ],
    }


def already_shown(name: str, value: Any, comparisons: Sequence[Comparison]) -> bool:
    """Whether a comparison shows the headline number `value` already: under its own name, or as a part of its share."""
    for comparison in comparisons:
        for cell in comparison.values.values():
            if name.startswith(comparison.name) and value == value_of(cell):
                return True
            if isinstance(cell, dict) and name in cell and value == cell[name]:
                return True
    return False


def _column(name: str, cells: list[Cell]) -> dict[str, Any]:
    scale = scale_of(name, cells)
    unit = " %" if scale.percent else ""
    return {
        "name": words(name),
        "share": any(isinstance(cell, dict) for cell in cells),
        "number": any(value_of(cell) is not None for cell in cells),
        "texts": [scale.text(cell) + (unit if value_of(cell) is not None else "") for cell in cells],
    }


def _interval(share: Share, decimals: int) -> str:
    return f"{100 * share['low']:.{decimals}f}–{100 * share['high']:.{decimals}f}"


def _place(cell: Cell) -> dict[str, float] | None:
    """Where a share and the ends of its interval lie on an axis from 0 to 100."""
    return {key: 100 * cell[key] for key in ("accuracy", "low", "high")} if isinstance(cell, dict) else None
