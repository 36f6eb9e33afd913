"""report.html and curves.png: what a run did, for a reader who was not there. One file, nothing loaded from elsewhere.

A model's text is shown, never trusted: the template escapes everything but the curves, which are drawn here.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.files import plain, write_whole
from engine.report.charts import as_png, as_svg, curves_figure
from engine.report.content import Comparison, Sample, Table
from engine.report.numbers import duration, heading, scale_of
from engine.report.samples import shown_samples
from engine.report.tables import already_shown, shown_comparison, shown_table

logger = logging.getLogger(__name__)
AT_A_GLANCE = (
    "model_name_or_path", "dataset_name", "template", "compat", "use_peft", "learning_rate", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "max_completion_length", "temperature", "beta",
    "loss_type", "scale_rewards", "num_iterations", "data_root", "ann_paths", "vlm_path", "sam_ckpt", "decoder", "mask_loss",
    "judge_model", "seed",
)  # fmt: skip


@contextmanager
def alone(what: str | Path) -> Iterator[None]:
    """Inside, what fails costs itself alone, a picture or a page, and not the results beside it: a warning of one line."""
    try:
        yield
    except Exception as error:
        reason = (getattr(error, "strerror", None) or str(error)).strip().splitlines() or [""]
        logger.warning("%s: cannot be made (%s: %s)", what, type(error).__name__, reason[0])


def write_curves(path: str | Path, rows: list[dict]) -> None:
    """Draw the rows of metrics.jsonl as a PNG; a warning where that fails."""
    with alone(path):
        write_whole(path, as_png(curves_figure(rows)))


def write_report(path: str | Path, **content: Any) -> None:
    """Write the page that `page_of` makes of its content; a warning where that fails."""
    with alone(path):
        write_whole(path, page_of(**content))


def page_of(
    *,
    title: str,
    headline: dict[str, Any],
    settings: dict[str, Any],
    rows: list[dict],
    comparisons: Sequence[Comparison] = (),
    tables: Sequence[Table] = (),
    samples: Sequence[Sample] = (),
    legend: str = "",
    skipped: Sequence[str] = (),
) -> str:
    """The page.

    headline: name -> number or text; what a comparison shows is not shown twice. settings: name -> value, or group -> {name:
    value}. rows: those of metrics.jsonl. `legend` says what is drawn over the images. skipped: a line for each bad row left out.
    """
    import jinja2
    from markupsafe import Markup

    groups = {name: value for name, value in settings.items() if isinstance(value, dict)}
    loose = {name: value for name, value in settings.items() if name not in groups}
    every = loose | {name: value for group in groups.values() for name, value in group.items()}
    answers = [answer for sample in samples for answer in sample.answers]
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.PackageLoader("engine.report", ""),
    )
    return environment.get_template("report.html").render(
        title=title,
        written=time.strftime("%Y-%m-%d %H:%M"),
        comparisons=[shown_comparison(comparison) for comparison in comparisons],
        tiles={
            heading(name): _tile(name, v)
            for name, v in headline.items()
            if v is not None and not already_shown(name, v, comparisons)
        },
        tables=[shown_table(table) for table in tables if table.lines],
        curves=Markup(as_svg(curves_figure(rows))) if rows else None,
        groups=any("frac_reward_zero_std" in row for row in rows),
        samples=shown_samples(samples),
        single=all(len(sample.answers) == 1 for sample in samples),
        scored=any(answer.scores for answer in answers),
        advantages=any(answer.advantage is not None for answer in answers),
        legend=legend,
        skipped=skipped,
        glance={name: every[name] for name in AT_A_GLANCE if every.get(name) is not None},
        settings={"": loose} | groups if loose else groups,
    )


def _tile(name: str, value: Any) -> str:
    """A headline's value as text."""
    value = plain(value)
    if name == "seconds" and isinstance(value, int | float):
        return duration(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    scale = scale_of(name, [value])
    return scale.text(value) + (" %" if scale.percent else "")
