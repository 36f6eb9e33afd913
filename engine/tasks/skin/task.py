"""Skin lesions: the diagnosis, where the lesion lies, its box, and the form of the answer (Skin diagnosis with spatial awareness).

A reward is None where the question did not ask for it, or the truth is not known. The default weighs 40 % diagnosis, 30 % location
and 30 % box, as the published README has it; the form is logged and weighs nothing, since what cannot be read earns nothing anyway.

    diagnosis   1 where the text names exactly the right one of the seven
    location    1 for the right region of the image ("tagged": the right body part)
    box         intersection over union with the true box, 0 to 1
    format      1 where the whole text has the form of the answers to learn

`engine.tasks.skin.published` rewards as the published code does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.lesions import DIAGNOSES, skin_prompt
from engine.data.rows import Rows
from engine.evaluation.score import Score
from engine.report.content import Cell, Sample, ShownAnswer, value_of
from engine.report.overlay import draw_overlay
from engine.rollout.answers import Answer, Answers
from engine.rollout.policy import Message
from engine.tasks.evaluation import Evaluation, instructive
from engine.tasks.multiple_choice import named
from engine.tasks.skin.answers import box_iou, read_box, read_diagnosis, read_region, tagged
from engine.tasks.task import Reward

_SENTENCE = r"This appears to be [^.\n]+\."
_PLACED = _SENTENCE + r" The lesion is located in the (?:upper|center|lower)-(?:left|center|right) region\."
_BOX = r"\[[0-9]{1,6}, [0-9]{1,6}, [0-9]{1,6}, [0-9]{1,6}\]"
_FORMS = {
    "diagnosis": re.compile(_SENTENCE),
    "location": re.compile(_PLACED),
    "box": re.compile(rf"{_PLACED} Its bounding box is {_BOX}\."),
    "tagged": re.compile(rf"<diagnosis>[^<>\n]+</diagnosis>\s*<location>[^<>\n]+</location>\s*<bbox>{_BOX}</bbox>"),
}


def diagnosis_reward(prompts: Any, completions: list[str], dx: list[str], **columns: Any) -> list[float]:
    """1 where `read_diagnosis` gives the row's `dx`."""
    return [float(read_diagnosis(text) == gold) for text, gold in zip(completions, dx, strict=True)]


def location_reward(
    prompts: Any,
    completions: list[str],
    question_type: list[str],
    spatial_description: list[str | None],
    localization: list[str | None],
    **columns: Any,
) -> list[float | None]:
    """1 where the text names the region, or in answer to "tagged" the body part; None where neither is asked for or known."""
    rows = zip(completions, question_type, spatial_description, localization, strict=True)
    return [_location(*row) for row in rows]


def _location(text: str, question: str, region: str | None, body_part: str | None) -> float | None:
    if question == "tagged":
        if body_part in (None, "unknown"):
            return None
        return float(" ".join((tagged(text, "location") or "").lower().split()) == body_part.lower())
    if question == "diagnosis" or region is None:
        return None
    return float(f"lesion located in {read_region(text)} region" == region)


def box_reward(
    prompts: Any, completions: list[str], question_type: list[str], bbox: list[list[float] | None], **columns: Any
) -> list[float | None]:
    """Intersection over union of the text's box and the row's; None where no box is asked for."""
    asked = [gold is not None and question in ("box", "tagged") for question, gold in zip(question_type, bbox, strict=True)]
    rows = zip(completions, bbox, asked, strict=True)
    return [box_iou(read_box(text), gold) if wanted else None for text, gold, wanted in rows]


def format_reward(prompts: Any, completions: list[str], question_type: list[str], **columns: Any) -> list[float]:
    """1 where the whole text has the form of the answers to that kind of question, white space around it aside."""
    return [
        float(_FORMS[question].fullmatch(text.strip()) is not None)
        for text, question in zip(completions, question_type, strict=True)
    ]


REWARDS = (diagnosis_reward, location_reward, box_reward, format_reward)
WEIGHTS = (0.4, 0.3, 0.3, 0.0)


@dataclass
class LesionTask:
    """Rows of `engine.data.lesions`. `compat` stands in evaluation files: whose rewards these are."""

    rewards: Sequence[Reward] = tuple(named(reward.__name__.removesuffix("_reward"), reward) for reward in REWARDS)
    reward_weights: Sequence[float] | None = WEIGHTS
    compat: str = "default"
    legend: str = "Red is the predicted box, green the true one."

    def prompt(self, row: dict) -> list[Message]:
        return skin_prompt(row)

    def target(self, row: dict) -> str:
        return row["solution"]

    def score(self, row: dict, answer: Answer) -> dict[str, Any]:
        """`correct` is the diagnosis; `region_correct` and `iou` are None where the question does not ask for them."""
        columns = {key: [row[key]] for key in ("dx", "question_type", "spatial_description", "localization", "bbox")}
        rewarded = {reward.__name__: reward(None, [answer.text], **columns)[0] for reward in REWARDS}
        place = rewarded["location_reward"]
        return {
            **{key: row[key] for key in ("source", "row", "image_id", "question_type", "dx", "spatial_description", "bbox")},
            "question": row["problem"],
            "solution": row["solution"],
            "model_output": answer.text,
            "diagnosis": read_diagnosis(answer.text),
            "region": read_region(answer.text),
            "box": read_box(answer.text),
            "correct": rewarded["diagnosis_reward"] == 1,
            "region_correct": None if place is None else place == 1,
            "iou": rewarded["box_reward"],
        }

    def evaluation(self, results: list[dict]) -> Evaluation:
        """Accuracy of diagnoses, exact match of regions, mean intersection over union of boxes; recall of each diagnosis."""
        overall = Score.of([result["correct"] for result in results]).as_dict()
        measures: dict[str, Cell] = {"accuracy": overall}
        placed = [result["region_correct"] for result in results if result["region_correct"] is not None]
        if placed:
            measures["region_accuracy"] = Score.of(placed).as_dict()
        boxed = [result["iou"] for result in results if result["iou"] is not None]
        if boxed:
            measures["mean_iou"] = sum(boxed) / len(boxed)
        by_dx = {dx: [result["correct"] for result in results if result["dx"] == dx] for dx in DIAGNOSES}
        recall = {DIAGNOSES[dx]: Score.of(right).as_dict() for dx, right in by_dx.items() if right}
        undecided = sum(result["diagnosis"] is None for result in results) / len(results)
        headline = {key: overall[key] for key in ("accuracy", "low", "high", "num_samples")} | {"unanswered": undecided}
        headline |= {name: value_of(cell) for name, cell in measures.items()}
        return Evaluation(
            results,
            headline=headline,
            measures=measures,
            notes={"accuracy": f"{100 * undecided:.1f} % without a diagnosis"},
            baselines={"majority_accuracy": max(map(len, by_dx.values())) / len(results)},
            tables={"diagnosis": {name: {"recall": share} for name, share in recall.items()}},
            summary={"compat": self.compat, "scores": {"overall": overall, "recall": recall}},
        )

    def files(self, evaluation: Evaluation) -> dict[str, bytes | str]:
        return {}

    def shown(self, row: dict) -> tuple[str, str]:
        return row["problem"], row["solution"]

    def samples(self, evaluation: Evaluation, rows: Rows, answers: Answers) -> list[Sample]:
        samples = []
        for i in instructive(evaluation.results):
            row, result = rows[i], evaluation.results[i]
            picture = draw_overlay(row["images"][0], predicted_box=result["box"], true_box=row["bbox"])
            scores = {"diagnosis": float(result["correct"]), "IoU": result["iou"]}
            shown = ShownAnswer(result["model_output"], {k: v for k, v in scores.items() if v is not None}, right=result["correct"])
            samples.append(Sample(picture, *self.shown(row), [shown]))
        return samples
