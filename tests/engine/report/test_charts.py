"""Curves show what was logged, bars the shares that were given."""

import numpy as np
import pytest
from PIL import Image

from engine.report.charts import accuracy_figure, as_png, as_svg, curves_figure
from engine.report.report import write_curves


def metrics(steps: int) -> list[dict]:
    return [
        {
            "step": step,
            "reward": 1.0 + step / steps,
            "rewards/<b>/mean": 0.5,
            "kl": None if step == 2 else 0.01 * step,
            "seconds/train": 0.5,
        }
        for step in range(1, steps + 1)
    ]


def test_curves_show_only_what_was_logged(tmp_path):
    figure = curves_figure(metrics(20))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Reward", "KL to the reference", "Time"]
    steps, values = figure.axes[1].lines[0].get_data()
    assert steps.tolist() == [1, *range(3, 21)] and values[1] == 0.03
    write_curves(tmp_path / "curves.png", metrics(20))
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_the_thick_line_is_a_mean_over_a_tenth_of_the_run():
    rows = [{"step": i, "reward": float(i % 2)} for i in range(40)]
    raw, smooth = curves_figure(rows).axes[0].lines
    assert raw.get_ydata().tolist() == [float(i % 2) for i in range(40)]
    expected = [np.mean([j % 2 for j in range(max(0, i - 2), min(40, i + 3))]) for i in range(40)]
    np.testing.assert_allclose(smooth.get_ydata(), expected, atol=1e-12)


def test_a_pages_curves_take_the_colour_of_its_text():
    svg = as_svg(curves_figure(metrics(5)))
    assert svg.startswith("<svg") and "currentColor" in svg and "#1f2933" not in svg and "&lt;b&gt;" in svg


def test_bars_are_the_shares_with_their_intervals():
    shares = [
        {"accuracy": a, "low": a - 0.1, "high": a + 0.2, "num_correct": 0, "num_samples": n}
        for a, n in [(0.5, 9), (0.25, 4), (0.75, 5)]
    ]
    figure = accuracy_figure({"": {"All questions": shares[0]}, "By modality": {"CT": shares[1], "M" * 40: shares[2]}})
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [50, 25, 75]
    intervals = [bars.lines[2][0] for bars in axes.containers if hasattr(bars, "lines")]
    ends = [interval.get_segments()[0][:, 0].tolist() for interval in intervals]
    np.testing.assert_allclose(ends, [[40, 70], [15, 45], [65, 95]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["All questions", "CT", "M" * 33 + "…"]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["50.0 %  (40–70)  n = 9", "25.0 %  (15–45)  n = 4", "75.0 %  (65–95)  n = 5", "By modality"]
    assert as_png(figure)[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_metrics_has_an_empty_figure():
    figure = curves_figure([])
    assert not figure.axes and figure.texts[0].get_text() == "no metrics were logged"


@pytest.mark.parametrize("name", ["$5 and $6 x_y", "a $\\frac{$", "$", "\\alpha_1^2", "$$", "{}%s\x1b", "中文 $x$"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_drawn_as_they_are_whatever_is_in_them(name):
    """A dollar begins no formula."""
    share = {"accuracy": 0.5, "low": 0.0, "high": 1.0, "num_correct": 1, "num_samples": 2}
    figure = accuracy_figure({"": {"All questions": share}, "By modality": {name: share}})
    assert as_png(figure).startswith(b"\x89PNG")
    assert not any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())
    rows = [{"step": i, "reward": 1.0, f"rewards/{name}/mean": 0.5} for i in range(3)]
    assert as_svg(curves_figure(rows)).startswith("<svg")
