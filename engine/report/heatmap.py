"""Matrices as pictures: a number in each cell, on a colour that says how large it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.report.charts import INK, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class HeatMap:
    """`cells[row, column]`: what is drawn there, in percent or points; a place without one stays empty.

    `signed`: differences, coloured by their sign around 0; otherwise shares, from 0 to 100.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[str, str], float]
    row_label: str = "trained on"
    column_label: str = "tested on"
    signed: bool = False


def heat_figure(maps: Sequence[HeatMap]) -> "Figure":
    """The maps side by side. Cells of a row and a column of one name have a frame."""
    from matplotlib.figure import Figure

    widths = [1.2 + 0.62 * len(each.columns) for each in maps]
    height = 1.9 + 0.5 * max(len(each.rows) for each in maps)
    with styled():
        figure = Figure(figsize=(sum(widths) + 0.8, height), layout="constrained")
        for axes, each in zip(figure.subplots(1, len(maps), width_ratios=widths, squeeze=False)[0], maps, strict=True):
            _draw(axes, each)
    return figure


def _draw(axes, drawn: HeatMap) -> None:
    from matplotlib.patches import Rectangle

    values = np.array([[drawn.cells.get((row, column), np.nan) for column in drawn.columns] for row in drawn.rows])
    largest = np.nanmax(np.abs(values), initial=1.0) if drawn.signed else 100
    shown = axes.imshow(values, cmap="RdBu" if drawn.signed else "Blues", vmin=-largest if drawn.signed else 0, vmax=largest)
    for i, row in enumerate(drawn.rows):
        for j, column in enumerate(drawn.columns):
            value = values[i, j]
            if np.isnan(value):
                axes.text(j, i, "–", ha="center", va="center", color=INK, alpha=0.5)
                continue
            red, green, blue, _ = shown.cmap(shown.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5  # the luma of ITU-R BT.601
            text = f"{value:+.1f}" if drawn.signed else f"{value:.1f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
            if row == column:
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.3))
    axes.set_title(drawn.title, pad=10)
    turned = max(len(word) for name in drawn.columns for word in name.split()) > 9
    axes.set_xticks(range(len(drawn.columns)), [name.replace(" ", "\n") for name in drawn.columns], rotation=90 * turned)
    axes.set_yticks(range(len(drawn.rows)), [name.replace(" ", "\n") for name in drawn.rows])
    axes.set_xlabel(drawn.column_label)
    axes.set_ylabel(drawn.row_label)
    axes.tick_params(length=0, labelsize=8)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
