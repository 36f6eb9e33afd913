"""Questions that are answered in words and with a mask (PRS-Med, arXiv:2505.11872): the published tables, and right places.

    place accuracy = answers that name exactly the places of the `position` column / all answers      (read by fixed rules)
    majority       = the same for the constant answer that is right most often in the set: what an accuracy has to beat
    judge accuracy = see `engine.evaluation.judge`, with the `position` column as the truth, as published

A mask is sigmoid(logits) in 256 levels, as a PNG would keep it. A `stretched` mask has its lowest value at 0 and its highest at
255, image by image, as in the published inference; an empty prediction then becomes a full one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from engine.data.positions import locate, read_positions, same_places
from engine.data.rows import Rows
from engine.evaluation.judge import Judge, judge_scores
from engine.evaluation.mask_metrics import NAMES, mask_levels, score_mask, summarise
from engine.evaluation.score import Score
from engine.report.content import Sample, ShownAnswer
from engine.report.overlay import draw_overlay
from engine.rollout.answers import Answer, Answers
from engine.rollout.policy import Message
from engine.tasks.evaluation import Evaluation, table_csv
from engine.tasks.task import Reward

ALL = "all"  # the line of all rows together


@dataclass(frozen=True)
class MaskAnswers:
    """Answers of `segment(images, questions) -> [(text, mask logits [H, W] in the image's size)]` to rows."""

    segment: Callable[[list, list[str]], list[tuple[str, Tensor]]]
    stretched: bool = False

    def __call__(self, rows: list[dict]) -> list[Answer]:
        found = self.segment([row["image"] for row in rows], [row["question"] for row in rows])
        return [Answer(text, mask_levels(logits.float().sigmoid().cpu().numpy(), self.stretched)) for text, logits in found]


@dataclass
class MaskTask:
    """Rows of `engine.data.masked_questions`. `compat` stands in evaluation files: how the answers were made."""

    compat: str = "default"
    rewards: Sequence[Reward] = field(default_factory=list)
    reward_weights: Sequence[float] | None = None
    legend: str = "Red is the predicted mask, the green line the edge of the true one."

    def prompt(self, row: dict) -> list[Message]:
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]

    def target(self, row: dict) -> str:
        return row["answer"]

    def score(self, row: dict, answer: Answer) -> dict[str, Any]:
        """The measures of the mask (see `score_mask`; the sweep under `_sweep`) and the places that the text names.

        Raises ValueError for an answer without a mask.
        """
        truth = np.asarray(row["mask"]) > 0
        scores = score_mask(answer.levels, truth)
        true_positions, positions = read_positions(row["position"]) or locate(truth), read_positions(answer.text)
        return {
            **{key: row[key] for key in ("source", "row", "dataset", "image_id", "question")},
            "true_answer": row["answer"],
            "true_position": row["position"],
            "true_places": [position.place for position in true_positions],
            "model_answer": answer.text,
            "places": [position.place for position in positions],
            "correct": same_places(true_positions, positions),
            "_sweep": scores.pop("sweep"),
            **scores,
        }

    def evaluation(self, results: list[dict]) -> Evaluation:
        """The published measures: of each data set, in the order they were read, then of all rows together."""
        names = list(dict.fromkeys(result["dataset"] for result in results))
        table = {name: _line([result for result in results if result["dataset"] == name]) for name in names}
        table[ALL] = line = _line(results)
        measures = (
            "num_samples",
            *NAMES,
            "place_accuracy",
            "majority_accuracy",
            "unread",
            "judge_accuracy",
            "judge_std",
            "judge_unjudged",
        )
        columns = ("num_samples", *NAMES, "place_accuracy", "majority_accuracy", "judge_accuracy")
        share = Score.of([result["correct"] for result in results]).as_dict()
        return Evaluation(
            results,
            headline={name: line[name] for name in measures if name in line},
            measures={"dice": line["dice"], "place_accuracy": share},
            notes={"place_accuracy": f"{100 * line['majority_accuracy']:.1f} % for the best constant answer ({line['majority']})"},
            baselines={"majority_accuracy": line["majority_accuracy"]},
            tables={"data set": {name: {c: line[c] for c in columns if c in line} for name, line in table.items()}},
            summary={"compat": self.compat, "table": table},
        )

    def files(self, evaluation: Evaluation) -> dict[str, bytes | str]:
        return {"table{}.csv": table_csv("dataset", evaluation.summary["table"])}

    def shown(self, row: dict) -> tuple[str, str]:
        return f"{row['question']} ({row['dataset']})", row["answer"]

    def samples(self, evaluation: Evaluation, rows: Rows, answers: Answers, count: int = 12) -> list[Sample]:
        """From the worst mask to the best."""
        order = np.argsort([result["dice"] for result in evaluation.results], kind="stable")
        samples = []
        for i in map(int, order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]):
            row, result = rows[i], evaluation.results[i]
            (answer,) = answers([row])
            picture = draw_overlay(row["image"], answer.levels >= 128, truth=np.asarray(row["mask"]))
            shown = ShownAnswer(result["model_answer"], {"Dice": result["dice"]}, right=result["correct"])
            samples.append(Sample(picture, *self.shown(row), [shown]))
        return samples

    def judged(self, evaluation: Evaluation, judge: Judge) -> Evaluation:
        """The same with the judge's verdicts on the three published prompts as `judge` of each result."""
        cases = [
            {"question": result["question"], "truth": result["true_position"], "answer": result["model_answer"]}
            for result in evaluation.results
        ]
        verdicts = judge.judge(cases)
        return self.evaluation([{**result, "judge": own} for result, own in zip(evaluation.results, verdicts, strict=True)])


def _line(results: list[dict]) -> dict[str, Any]:
    """The measures of some results, as evaluation.json and table.csv have them."""
    place = Score.of([result["correct"] for result in results])
    common, count = Counter(" + ".join(sorted(result["true_places"])) for result in results).most_common(1)[0]
    line: dict[str, Any] = {"num_samples": len(results), **summarise({**result, "sweep": result["_sweep"]} for result in results)}
    line |= {"place_accuracy": place.accuracy, "place_low": place.interval[0], "place_high": place.interval[1]}
    line |= {"majority_accuracy": count / len(results), "majority": common}
    line["unread"] = sum(not result["places"] for result in results) / len(results)
    if all("judge" in result for result in results):
        line |= {f"judge_{name}": value for name, value in judge_scores([result["judge"] for result in results]).items()}
    return line


def format_table(evaluation: Evaluation) -> str:
    """The table as text: a line a data set, the measures of the paper and the position accuracies in percent."""
    table: dict[str, dict[str, Any]] = evaluation.tables["data set"]
    columns = [name for name in table[ALL] if name != "num_samples"]
    widths = [max(len(column), 5) for column in columns]
    indent = max(map(len, table)) + 2
    lines = [" " * (indent + 3) + "n" + "".join(f"  {column:>{width}}" for column, width in zip(columns, widths, strict=True))]
    for name, line in table.items():
        percents = ["-" if line.get(column) is None else f"{100 * line[column]:.1f}" for column in columns]
        cells = "".join(f"  {percent:>{width}}" for percent, width in zip(percents, widths, strict=True))
        lines.append(f"{name:<{indent}}{line['num_samples']:>4}{cells}")
    return "\n".join(lines)
