"""Figures of a run: training curves as small multiples, shares with their intervals. PNG for a folder, SVG for a page.

matplotlib is imported when a figure is drawn: most commands that import this module end without one.
"""

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.report.content import Share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"  # text and axes; an SVG takes the colour of the text around it instead
COLOURS = ("#2f6fde", "#e0762f", "#2a9d74", "#9460d0", "#c9497c")  # readable on white and on near-black
STYLE: Any = {  # the keys are matplotlib's
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 18,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with a dollar in it is a name
    "svg.hashsalt": "vesalius",
}


def styled() -> AbstractContextManager:
    import matplotlib

    return matplotlib.rc_context(STYLE)


@dataclass
class Panel:
    """One axes of the curves: `lines` maps metric names to labels; `band` are the metrics between which an area is filled."""

    title: str
    unit: str
    lines: dict[str, str]
    band: tuple[str, str] | None = None
    stacked: bool = False
    limits: tuple[float | None, float | None] = field(default=(None, None))


def _panels(rows: list[dict]) -> list[Panel]:
    components = sorted({key for row in rows for key in row if re.fullmatch(r"rewards/.+/mean", key)})
    fractions = {
        "frac_reward_zero_std": "groups of equal rewards",
        "completions/clipped_ratio": "answers cut off",
        "clip_ratio/region_mean": "clipped tokens",
    }
    terms = [key for key in ("loss/mask", "loss/text", "loss/class") if _series(rows, key)[1].any()]
    phases = {"seconds/rollout": "rollout", "seconds/reward": "reward", "seconds/train": "forward + backward"}
    panels = [
        Panel("Reward", "mean per answer", {"reward": "total"} | {key: key.split("/")[1] for key in components}),
        Panel("Accuracy", "fraction of questions", {"accuracy": "held out", "eval_accuracy": "held out"}, limits=(-0.02, 1.02)),
        Panel("Tokens right", "fraction of answer tokens", {"mean_token_accuracy": "greedy"}, limits=(-0.02, 1.02)),
        Panel("KL to the reference", "nats per token", {"kl": "KL"}),
        Panel("Entropy", "nats per token", {"entropy": "entropy"}, limits=(0, None)),
        Panel(
            "Answer length",
            "tokens",
            {"completions/mean_length": "mean"},
            ("completions/min_length", "completions/max_length"),
            limits=(0, None),
        ),
        Panel("Lost signal", "fraction", fractions, limits=(-0.02, 1.02)),
        Panel("Time", "seconds per step", phases, stacked=True, limits=(0, None)),
        Panel("Throughput", "answer tokens per second", {"tokens_per_second": "tokens/s"}, limits=(0, None)),
        Panel("Loss", "", {"loss": "total" if terms else "loss"} | {key: key.split("/")[1] for key in terms}),
        Panel("Gradient norm", "before clipping", {"grad_norm": "norm"}, limits=(0, None)),
    ]
    return [panel for panel in panels if any(len(_series(rows, key)[0]) for key in panel.lines)]


def curves_figure(rows: list[dict]) -> "Figure":
    """Metrics over steps, one panel a kind, only those that have data; thin lines are raw, thick ones a moving mean.

    The number beside a line's name is where its moving mean ends.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(rows)
    columns = min(3, max(1, len(panels)))
    height = max(1, -(-len(panels) // columns))
    with styled():
        figure = Figure(figsize=(4.1 * columns, 2.85 * height), layout=ConstrainedLayoutEngine(h_pad=0.12))
        if not panels:
            figure.text(0.5, 0.5, "no metrics were logged", ha="center")
        for index, panel in enumerate(panels):
            _draw(figure.add_subplot(height, columns, index + 1), panel, rows)
    return figure


def _draw(axes: "Axes", panel: Panel, rows: list[dict]) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = {key: _series(rows, key) for key in panel.lines}
    drawn = {key: series for key, series in drawn.items() if len(series[0])}
    if panel.stacked:
        steps = next(iter(drawn.values()))[0]
        heights = [np.interp(steps, *series) for series in drawn.values()]
        axes.stackplot(steps, *heights, labels=[panel.lines[key] for key in drawn], colors=COLOURS, alpha=0.75, linewidth=0)
    for (key, (steps, values)), colour in zip(drawn.items(), COLOURS * len(drawn), strict=False):
        if panel.stacked:
            break
        smooth = _smooth(values)
        label = f"{panel.lines[key]} {smooth[-1]:{'.3g' if abs(smooth[-1]) < 1000 else '.0f'}}"
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(steps, smooth, color=colour, linewidth=1.9, label=label, marker="o" if len(steps) < 4 else None, markersize=4)
    if panel.band and all(len(_series(rows, key)[0]) for key in panel.band):
        (steps, low), (_, high) = (_series(rows, key) for key in panel.band)
        axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.13, linewidth=0, label="shortest to longest")
    axes.set_title(panel.title)
    axes.text(0, 1.03, panel.unit, transform=axes.transAxes, fontsize=8, alpha=0.7)
    axes.margins(x=0.01, y=0.1)
    axes.set_ylim(*panel.limits)
    if len(drawn) > 1 and panel.limits[1] is None:  # room for the legend
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, bottom + 1.3 * (top - bottom))
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(length=0)
    axes.legend(loc="best", handlelength=1.2, labelspacing=0.25)


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have a finite number there."""
    points = [(row.get("step", i), row[key]) for i, row in enumerate(rows) if isinstance(row.get(key), int | float)]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a tenth of the series; at its ends over what there is."""
    width = max(1, len(values) // 10) | 1
    inside = slice(width // 2, width // 2 + len(values))
    sums, counts = (np.convolve(series, np.ones(width))[inside] for series in (values, np.ones(len(values))))
    return sums / counts


def accuracy_figure(sections: dict[str, dict[str, Share]]) -> "Figure":
    """Bars of shares with their 95 % intervals, section by section; the first bar stands out.

    sections: heading -> name -> share, as {"": {"All questions": share}, "By modality": {"CT": share, "MRI": share}}.
    """
    from matplotlib.figure import Figure

    lines = [(title, name, share) for title, shares in sections.items() for name, share in shares.items()]
    with styled():
        places: list[float] = []
        titles: dict[str, float] = {}
        at = 0.0
        for i, (title, _, _) in enumerate(lines):
            if i and title != lines[i - 1][0]:
                at += 1.1
                titles[title] = at - 0.85
            places.append(at)
            at += 1
        figure = Figure(figsize=(7.2, 1.1 + 0.34 * at), layout="constrained")
        axes = figure.add_subplot()
        for place, (_, _, share) in zip(places, lines, strict=True):
            percent, low, high = (100 * share[key] for key in ("accuracy", "low", "high"))
            ends = [[max(0, percent - low)], [max(0, high - percent)]]
            axes.barh(place, percent, height=0.66, color=COLOURS[0], alpha=1 if place == 0 else 0.7)
            axes.errorbar(percent, place, xerr=ends, color=INK, capsize=3, linewidth=1.2)
            axes.text(101.5, place, f"{percent:.1f} %  ({low:.0f}–{high:.0f})  n = {share['num_samples']}", va="center", fontsize=8)
        for title, place in titles.items():
            axes.text(0, place, title, fontsize=9, fontweight="bold", va="center")
        axes.set_yticks(places, [_short(name) for _, name, _ in lines])
        axes.set_ylim(at - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy in %, with 95 % interval")
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
    return figure


def _short(name: str, length: int = 34) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def as_png(figure: "Figure", dpi: int = 130) -> bytes:
    """The figure on white."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def as_svg(figure: "Figure") -> str:
    """The figure as an <svg> element without background, its ink in the colour of the page's text."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
