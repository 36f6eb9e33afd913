"""Skin lesions: the diagnosis, where the lesion lies, its box, and the form of the answer (Skin diagnosis with spatial awareness).

A reward is None where the question did not ask for it, or the truth is not known. The default weighs 40 % diagnosis, 30 % location
and 30 % box, as the published README has it; the form is logged and weighs nothing, since what cannot be read earns nothing anyway.

    diagnosis   1 where the text names exactly the right one of the seven
    location    1 for the right region of the image ("tagged": the right body part)
    box         intersection over union with the true box, 0 to 1; or "mask", of the mask that a model finds for the box
    format      1 where the whole text has the form of the answers to learn

`engine.tasks.skin.published` rewards as the published code does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data.lesions import skin_prompt
from engine.data.rows import Rows
from engine.report.content import Sample, ShownAnswer
from engine.report.overlay import draw_overlay
from engine.rollout.answers import Answer, Answers
from engine.rollout.policy import Message
from engine.tasks.evaluation import Evaluation, instructive
from engine.tasks.multiple_choice import named
from engine.tasks.skin.answers import read_box, read_diagnosis, read_region, tagged
from engine.tasks.skin.evaluation import confusion_png, evaluate_lesions
from engine.tasks.skin.overlap import MaskReward, Segment, box_reward
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


def format_reward(prompts: Any, completions: list[str], question_type: list[str], **columns: Any) -> list[float]:
    """1 where the whole text has the form of the answers to that kind of question, white space around it aside."""
    return [
        float(_FORMS[question].fullmatch(text.strip()) is not None)
        for text, question in zip(completions, question_type, strict=True)
    ]


WEIGHTS = (0.4, 0.3, 0.3, 0.0)


def lesion_rewards(box: Reward = box_reward, name: str = "box") -> list[Reward]:
    """The four under the names of their metrics; `box` scores the predicted box under the metric `name`."""
    functions: dict[str, Reward] = {"diagnosis": diagnosis_reward, "location": location_reward, name: box, "format": format_reward}
    return [named(metric, function) for metric, function in functions.items()]


@dataclass
class LesionTask:
    """Rows of `engine.data.lesions`. `compat` stands in evaluation files: whose rewards these are. `overlap`: what `iou` is."""

    rewards: Sequence[Reward] = field(default_factory=lesion_rewards)
    reward_weights: Sequence[float] | None = WEIGHTS
    compat: str = "default"
    overlap: Reward = box_reward
    legend: str = "Red is the predicted box, green the true one."

    @classmethod
    def of(cls, segment: Segment | None) -> "LesionTask":
        """Scores boxes themselves, or the masks that `segment` finds for them."""
        if segment is None:
            return cls()
        reward = MaskReward(segment)
        return cls(lesion_rewards(reward, "mask"), overlap=reward)

    def prompt(self, row: dict) -> list[Message]:
        return skin_prompt(row)

    def target(self, row: dict) -> str:
        return row["solution"]

    def score(self, row: dict, answer: Answer) -> dict[str, Any]:
        """`correct` is the diagnosis; `region_correct` and `iou` are None where the question does not ask for them."""
        texts, columns = [answer.text], {key: [value] for key, value in row.items()}
        (place,), (iou,) = location_reward(None, texts, **columns), self.overlap(None, texts, **columns)
        return {
            **{key: row[key] for key in ("source", "row", "image_id", "question_type", "dx", "spatial_description", "bbox")},
            "question": row["problem"],
            "solution": row["solution"],
            "model_output": answer.text,
            "diagnosis": read_diagnosis(answer.text),
            "region": read_region(answer.text),
            "box": read_box(answer.text),
            "correct": read_diagnosis(answer.text) == row["dx"],
            "region_correct": None if place is None else place == 1,
            "iou": iou,
        }

    def evaluation(self, results: list[dict]) -> Evaluation:
        return evaluate_lesions(results, self.compat)

    def files(self, evaluation: Evaluation) -> dict[str, bytes | str]:
        return {"confusion{}.png": confusion_png(evaluation.summary["confusion"]["rows"])}

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
