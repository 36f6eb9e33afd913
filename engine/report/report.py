"""report.html and curves.png: what a run did, for a reader who was not there. One file, nothing loaded from elsewhere.

A model's text is shown, never trusted: the template escapes everything that is not built here.
"""

import base64
import io
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from engine.command.run import plain
from engine.data.options import parse_options
from engine.evaluation.questions import GROUPINGS, Evaluation
from engine.files import write_whole
from engine.report.charts import as_png, as_svg, curves_figure

IMAGE_SIDE = 448  # pixels of the longer side of a shown image, at most
AT_A_GLANCE = (
    "model_name_or_path", "dataset_name", "template", "compat", "use_peft", "learning_rate", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "max_completion_length", "temperature", "beta",
    "loss_type", "scale_rewards", "num_iterations", "data_root", "ann_paths", "vlm_path", "sam_ckpt", "decoder", "mask_loss",
    "judge_model", "seed",
)  # fmt: skip


def write_curves(path: str | Path, rows: list[dict]) -> None:
    """Draw the rows of metrics.jsonl as a PNG."""
    write_whole(path, as_png(curves_figure(rows)))


def write_report(
    path: str | Path,
    *,
    title: str,
    headline: dict,
    settings: dict,
    rows: list[dict],
    samples: list[dict],
    evaluations: dict[str, Evaluation] | None = None,
    measures: dict[str, dict[str, float]] | None = None,
    legend: str = "",
    skipped: Sequence[str] = (),
) -> None:
    """Write the page.

    headline: name -> number or text. settings: name -> value, or group -> {name: value}. rows: those of metrics.jsonl.
    samples: {"image": PIL, "step": int or None, "question": str, "solution": str, "completions": [{"text": str,
    "rewards": {name: float or None}, "advantage": float or None}]}; `legend` says what is drawn over the images.
    evaluations: in the order of time, of the same questions. measures: data set -> name -> number, the same names for each.
    skipped: one line for each bad row that was left out.
    """
    evaluations = evaluations or {}
    groups = {name: value for name, value in settings.items() if isinstance(value, dict)}
    loose = {name: value for name, value in settings.items() if name not in groups}
    every = loose | {name: value for group in groups.values() for name, value in group.items()}
    shown = ("accuracy", "accuracy_before", "accuracy_after", "low", "high", "unanswered", "num_samples") if evaluations else ()
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.PackageLoader("engine.report", ""),
    )
    page = environment.get_template("report.html").render(
        title=title,
        written=time.strftime("%Y-%m-%d %H:%M"),
        headline={_words(key): _format(key, value) for key, value in headline.items() if value is not None and key not in shown},
        glance={name: every[name] for name in AT_A_GLANCE if every.get(name) is not None},
        settings={"": loose} | groups if loose else groups,
        curves=Markup(as_svg(curves_figure(rows))) if rows else None,
        groups=any("frac_reward_zero_std" in row for row in rows),
        scores={name: _shown_score(evaluation.overall) for name, evaluation in evaluations.items()},
        unanswered={name: evaluation.unanswered for name, evaluation in evaluations.items()},
        change=_change(list(evaluations.values())),
        tables=[table for grouping in GROUPINGS if (table := _table(grouping, evaluations))],
        measures={
            name: {_words(key): _format(key, value) for key, value in line.items()} for name, line in (measures or {}).items()
        },
        legend=legend,
        samples=_shown_samples(samples),
        single=bool(samples)
        and all(len(sample["completions"]) == len(sample["completions"][0]["rewards"]) == 1 for sample in samples),
        advantages=any(completion.get("advantage") is not None for sample in samples for completion in sample["completions"]),
        skipped=skipped,
    )
    write_whole(path, page)


def evaluation_samples(evaluation: Evaluation, questions, count: int = 12) -> list[dict]:
    """Samples of an evaluated `QuestionSet` for `write_report`: two wrong answers for each right one, spread over the set."""
    right = [i for i, result in enumerate(evaluation.results) if result["correct"]]
    wrong = [i for i, result in enumerate(evaluation.results) if not result["correct"]]
    num_right = min(len(right), max(count // 3, count - len(wrong)))
    chosen = _spread(wrong, count - num_right) + _spread(right, num_right)
    samples = []
    for i in chosen:
        row, result = questions[i], evaluation.results[i]
        answer = {"text": result["model_output"], "rewards": {"correct": float(result["correct"])}, "advantage": None}
        picture = {"image": row["images"][0], "step": None, "question": row["problem"], "solution": row["solution"]}
        samples.append(picture | {"completions": [answer]})
    return samples


def _spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spaced."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _words(key: str) -> str:
    return {"seconds": "time"}.get(key, key.replace("_", " ").replace("/", " "))


def _format(key: str, value) -> str:
    value = plain(value)
    if key == "seconds" and isinstance(value, int | float):
        return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
    if isinstance(value, float):
        fraction = {"accuracy", "low", "high", "unanswered", "unread"} & set(key.split("_")) and 0 <= value <= 1
        return f"{100 * value:.1f} %" if fraction else f"{value:.4g}"
    return f"{value:,}".replace(",", " ") if type(value) is int else str(value)


def _shown_score(score) -> dict:
    """The numbers of a score in percent."""
    return {key: value if key.startswith("num") else 100 * value for key, value in score.as_dict().items()}


def _change(evaluations: list[Evaluation]) -> dict | None:
    """From the first evaluation to the last: gain in points, questions newly right and newly wrong."""
    if len(evaluations) < 2 or len(evaluations[0].results) != len(evaluations[-1].results):
        return None
    pairs = [(a["correct"], b["correct"]) for a, b in zip(evaluations[0].results, evaluations[-1].results, strict=True)]
    gain = 100 * (evaluations[-1].overall.accuracy - evaluations[0].overall.accuracy)
    return {"gain": gain, "fixed": pairs.count((False, True)), "broken": pairs.count((True, False))}


def _table(grouping: str, evaluations: dict[str, Evaluation]) -> dict | None:
    """Accuracy of each group in each evaluation; None where the labels do not tell the questions apart."""
    scores = {name: evaluation.by(grouping) for name, evaluation in evaluations.items()}
    names = sorted({group for by_group in scores.values() for group in by_group})
    lines = {group: [_shown_score(by[group]) for by in scores.values() if group in by] for group in names}
    return {"title": _words(grouping), "columns": list(scores), "lines": lines} if len(lines) > 1 else None


def _shown_samples(samples: list[dict]) -> list[dict]:
    """Samples as the template wants them; `level` (0-1) is where an answer's reward lies among all that are shown."""
    completions = [completion for sample in samples for completion in sample["completions"]]
    totals = [_total(completion) for completion in completions]
    low, high = min(totals, default=0), max(totals, default=0)
    largest = max((abs(completion.get("advantage") or 0) for completion in completions), default=0) or 1
    return [
        {
            **sample,
            "image": _data_uri(sample["image"]),
            "solution": _gold(sample["question"], sample["solution"]),
            "completions": [
                {
                    "text": _mark_tags(completion["text"]),
                    "rewards": completion["rewards"],
                    "total": _total(completion),
                    "level": (_total(completion) - low) / (high - low) if high > low else float(_total(completion) > 0),
                    "advantage": completion.get("advantage"),
                    "share": (completion.get("advantage") or 0) / largest,
                }
                for completion in sample["completions"]
            ],
        }
        for sample in samples
    ]


def _gold(question: str, solution: str) -> str:
    """`<answer> C </answer>` -> `C) CT` where the question lists its options, else the bare solution."""
    answer = re.sub(r"</?answer>", "", solution).strip()
    text = parse_options(question).get(answer)
    return f"{answer}) {text}" if text else answer


def _total(completion: dict) -> float:
    return sum(value for value in completion["rewards"].values() if value is not None)


def _mark_tags(text: str) -> Markup:
    """The escaped text, its think and answer tags in a <span class="tag">."""
    return Markup(re.sub(r"&lt;(/?(?:think|answer))&gt;", r'<span class="tag">&lt;\1&gt;</span>', str(escape(text))))


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
