"""Masks and answers of a model on masked questions: the published tables, and the accuracy of positions (arXiv:2505.11872).

    place accuracy = answers that name exactly the places of the `position` column / all answers      (read by fixed rules)
    majority       = the same for the constant answer that is right most often in the set: what an accuracy has to beat
    judge accuracy = see `engine.evaluation.judge`, with the `position` column as the truth, as published

A mask is sigmoid(logits), kept in 256 levels as a PNG would keep it. With `compat="reference"` it is first stretched to its full
range, image by image, as the published inference does; an empty prediction then becomes a full one.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from engine.data.positions import locate, read_positions, same_places
from engine.errors import InputError
from engine.evaluation.judge import Judge, judge_scores
from engine.evaluation.mask_metrics import NAMES, quantise, score_mask, stretch, summarise
from engine.evaluation.questions import Score
from engine.files import write_json, write_whole
from engine.processes import gather, my_share
from engine.report.overlay import draw_overlay

ALL = "all"  # the line of all rows together
LEGEND = "Red is the predicted mask, the green line the edge of the true one."


@dataclass
class SegmentationEvaluation:
    """One entry of `results` a row, in the rows' order, and of `scores` (see `score_mask`); `verdicts` where a judge was asked."""

    results: list[dict]
    scores: list[dict]
    compat: str
    verdicts: list[list[bool | None]] = field(default_factory=list)

    def table(self) -> dict[str, dict]:
        """{data set: its measures}, then all rows together; a set's own come first in the order they were read."""
        names = list(dict.fromkeys(result["dataset"] for result in self.results))
        groups = {name: [i for i, result in enumerate(self.results) if result["dataset"] == name] for name in names}
        return {name: self._line(chosen) for name, chosen in (groups | {ALL: range(len(self.results))}).items()}

    def _line(self, chosen) -> dict:
        results = [self.results[i] for i in chosen]
        place = Score(sum(result["place_correct"] for result in results), len(results))
        common, count = Counter(" + ".join(sorted(result["true_places"])) for result in results).most_common(1)[0]
        line = {"num_samples": len(results), **summarise(self.scores[i] for i in chosen)}
        line |= {"place_accuracy": place.accuracy, "place_low": place.interval[0], "place_high": place.interval[1]}
        line |= {"majority_accuracy": count / len(results), "majority": common}
        line["unread"] = sum(not result["places"] for result in results) / len(results)
        if self.verdicts:
            line |= {f"judge_{name}": value for name, value in judge_scores([self.verdicts[i] for i in chosen]).items()}
        return line

    def shown(self) -> dict[str, dict]:
        """The table without what only a file needs: the paper's measures and the accuracies of positions."""
        columns = ["num_samples", *NAMES, "place_accuracy", "majority_accuracy"] + ["judge_accuracy"] * bool(self.verdicts)
        return {name: {column: line[column] for column in columns} for name, line in self.table().items()}

    def headline(self) -> dict:
        """The measures of all rows together that the paper reports, and what position accuracy has to be compared with."""
        line = self.table()[ALL]
        shown = ("num_samples", *NAMES, "place_accuracy", "majority_accuracy", "unread", "judge_accuracy", "judge_std")
        return {name: line[name] for name in shown if name in line}


def evaluate_segmentation(
    segment_fn: Callable,
    rows,
    *,
    batch_size: int = 1,
    compat: str = "default",
    keep_mask: Callable[[dict, np.ndarray], None] | None = None,
    progress: bool = True,
) -> SegmentationEvaluation:
    """Ask every row of a `MaskedQuestions`.

    `segment_fn(images, questions)` gives a list of (answer, mask logits [H, W] in the image's size). `keep_mask` is called with
    each row and its mask [H, W] in 256 levels. Where processes were started together the rows are divided among them, and every
    process returns the whole.
    """
    found, mine = {}, my_share(range(len(rows)))
    with tqdm(total=len(mine), desc="evaluating", unit="row", disable=not progress) as bar:
        for start in range(0, len(mine), batch_size):
            places = mine[start : start + batch_size]
            batch = [rows[i] for i in places]
            outputs = segment_fn([row["image"] for row in batch], [row["question"] for row in batch])
            for i, row, (answer, logits) in zip(places, batch, outputs, strict=True):
                truth = np.asarray(row["mask"]) > 0
                levels = to_levels(logits, compat)
                score = score_mask(levels, truth)
                if keep_mask is not None:
                    keep_mask(row, levels)
                found[i] = _result(row, truth, answer, score), score
                bar.update()
    found = gather(found)
    results, scores = zip(*(found[i] for i in range(len(rows))), strict=True)
    return SegmentationEvaluation(list(results), list(scores), compat)


def to_levels(logits: torch.Tensor, compat: str = "default") -> np.ndarray:
    """Mask logits [H, W] -> uint8, 0 to 255 for a probability of 0 to 1, or for the lowest to the highest of the image."""
    probability = torch.sigmoid(logits.float()).cpu().numpy()
    return quantise(stretch(probability) if compat == "reference" else probability)


def _result(row: dict, truth: np.ndarray, answer: str, score: dict) -> dict:
    true_positions = read_positions(row["position"]) or locate(truth)
    positions = read_positions(answer)
    return {
        **{key: row[key] for key in ("source", "row", "dataset", "image_id", "question")},
        "true_answer": row["answer"],
        "true_position": row["position"],
        "true_places": [position.place for position in true_positions],
        "model_answer": answer,
        "places": [position.place for position in positions],
        "place_correct": same_places(true_positions, positions),
        **{key: value for key, value in score.items() if key != "sweep"},
    }


def ask_judge(evaluation: SegmentationEvaluation, judge: Judge, progress: bool = True) -> None:
    """Let the judge decide every answer; each result gets `judge`, its verdicts on the three prompts."""
    cases = [
        {"question": result["question"], "truth": result["true_position"], "answer": result["model_answer"]}
        for result in evaluation.results
    ]
    evaluation.verdicts = judge.judge(cases, progress)
    for result, verdicts in zip(evaluation.results, evaluation.verdicts, strict=True):
        result["judge"] = verdicts


def write_segmentation_evaluation(folder: str | Path, evaluation: SegmentationEvaluation) -> None:
    """Write evaluation.json (compat, table, results) and table.csv (a line a data set)."""
    table = evaluation.table()
    write_json(Path(folder) / "evaluation.json", {"compat": evaluation.compat, "table": table, "results": evaluation.results})
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", *table[ALL]])
    writer.writerows([name, *line.values()] for name, line in table.items())
    write_whole(Path(folder) / "table.csv", text.getvalue())


def format_table(evaluation: SegmentationEvaluation) -> str:
    """The table as text: a line a data set, the measures of the paper and the position accuracies in percent."""
    table = evaluation.shown()
    columns = [name for name in table[ALL] if name != "num_samples"]
    widths = [max(len(column), 5) for column in columns]
    indent = max(map(len, table)) + 2
    lines = [" " * (indent + 3) + "n" + "".join(f"  {column:>{width}}" for column, width in zip(columns, widths, strict=True))]
    for name, line in table.items():
        cells = "".join(f"  {100 * line[column]:>{width}.1f}" for column, width in zip(columns, widths, strict=True))
        lines.append(f"{name:<{indent}}{line['num_samples']:>4}{cells}")
    return "\n".join(lines)


def segmentation_samples(evaluation: SegmentationEvaluation, rows, segment_fn: Callable, count: int = 12) -> list[dict]:
    """Samples for `engine.report.report.write_report`, from the worst mask to the best: predicted masks red, true edges green."""
    order = np.argsort([result["dice"] for result in evaluation.results], kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]
    samples = []
    for i in map(int, chosen):
        row, result = rows[i], evaluation.results[i]
        ((_, logits),) = segment_fn([row["image"]], [row["question"]])
        picture = draw_overlay(row["image"], to_levels(logits, evaluation.compat) >= 128, truth=np.asarray(row["mask"]))
        answer = {"text": result["model_answer"], "rewards": {"Dice": result["dice"]}, "advantage": None}
        question = f"{row['question']} ({row['dataset']})"
        samples.append({"image": picture, "step": None, "question": question, "solution": row["answer"], "completions": [answer]})
    return samples


def newest_checkpoint(recipe: str, marker: str) -> Path:
    """The folder of the newest file `marker` among the runs of a recipe; InputError where it has not run here."""
    runs = Path("runs", recipe)
    found = sorted([*runs.glob(f"*/{marker}"), *runs.glob(f"*/*/{marker}")], key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise InputError(
            f"--model is missing: a checkpoint folder (python -m recipes.{recipe} makes one; none is in runs/{recipe})"
        )
    return found[-1].parent
