"""MeCoVQA's questions: closed and open, about an image or a region of it, and for masks (MedPLIB, Uni-MedVLM).

A prompt is the image, then the question, in which a region is a part of its own: `{"type": "region", "mask": PIL L}`. Words are
scored by `engine.evaluation.text_overlap`, masks by `engine.tasks.mecovqa.masks`. `answer_reward` is what an answer in words earns
in GRPO.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.data.mecovqa.tags import SEG
from engine.data.rows import Rows
from engine.evaluation.text_overlap import is_right, word_overlap
from engine.report.content import Sample, ShownAnswer
from engine.report.overlay import draw_overlay
from engine.rollout.answers import Answer, Answers
from engine.rollout.policy import Message
from engine.tasks.evaluation import Evaluation, instructive, table_csv
from engine.tasks.mecovqa.evaluation import evaluate_mecovqa
from engine.tasks.mecovqa.masks import FOUND, THRESHOLDS, dice_of_all, dice_of_none, score_masks
from engine.tasks.multiple_choice import named
from engine.tasks.task import Reward

COPIED = ("source", "row", "turn", "image_id", "kind", "modality", "question", "mask_ids", "mask_classes", "region_id")


def answer_reward(
    prompts: Any, completions: list[str], answer: list[str], answer_type: list[str | None], **columns: Any
) -> list[float | None]:
    """1 for the right answer to a closed question, the words' F1 for an open one; None where masks are the answer."""
    found: list[float | None] = []
    for text, true, kind in zip(completions, answer, answer_type, strict=True):
        words = None if kind is None else float(is_right(text, true)) if kind == "closed" else word_overlap(text, true).f1
        found.append(words)
    return found


def word_rewards() -> list[Reward]:
    return [named("answer", answer_reward)]


@dataclass
class MeCoVQATask:
    """Rows of `engine.data.mecovqa.rows`. `compat`: whether masks are scored well ("default") or as published ("reference")."""

    compat: str = "default"
    rewards: Sequence[Reward] = field(default_factory=word_rewards)
    reward_weights: Sequence[float] | None = None
    legend: str = "Red is the predicted mask, green the edge of the true one, yellow that of the region asked about."

    def prompt(self, row: dict) -> list[Message]:
        """The turns before, then the question; the image comes first of all."""
        parts = [part | {"mask": row.get("region")} if part["type"] == "region" else part for part in row["question_parts"]]
        turns = [*row["history"], {"role": "user", "content": parts}]
        first = turns[0]["content"]
        words = [{"type": "text", "text": first}] if isinstance(first, str) else first
        opening = {"role": "user", "content": [{"type": "image"} for _ in row["images"]] + words}
        return [opening, *turns[1:]]

    def target(self, row: dict) -> str:
        return row["answer"]

    def score(self, row: dict, answer: Answer) -> dict[str, Any]:
        """`answer_type` is closed, open or mask; masks have `dice`, `iou` and `has_seg`, open answers recall, precision and f1."""
        result = {key: row[key] for key in COPIED}
        result |= {
            "answer_type": "mask" if row["masks"] else row["answer_type"] or "open",
            "true_answer": row["answer"],
            "model_answer": answer.text,
        }
        if row["masks"]:
            truths = [np.asarray(mask) > 0 for mask in row["masks"]]
            dice, iou = score_masks(answer.masks, truths, self.compat)
            baselines = {"full_mask_dice": dice_of_all(truths), "empty_mask_dice": dice_of_none(truths)}
            scores = {"dice": dice, "iou": iou, "has_seg": SEG in answer.text, "num_masks": len(answer.masks), **baselines}
            return result | {"correct": iou > FOUND, **scores}
        overlap = word_overlap(answer.text, row["answer"])
        if row["answer_type"] == "closed":
            right = is_right(answer.text, row["answer"]) if self.compat == "default" else overlap.exact
            return result | {"correct": right}
        return result | {"correct": overlap.exact, "recall": overlap.recall, "precision": overlap.precision, "f1": overlap.f1}

    def evaluation(self, results: list[dict]) -> Evaluation:
        return evaluate_mecovqa(results, self.compat)

    def files(self, evaluation: Evaluation) -> dict[str, bytes | str]:
        """The table: a line for all rows, a kind of question, a modality."""
        return {"table{}.csv": table_csv("rows", evaluation.summary["table"])}

    def shown(self, row: dict) -> tuple[str, str]:
        return row["question"], row["answer"]

    def samples(self, evaluation: Evaluation, rows: Rows, answers: Answers, count: int = 12) -> list[Sample]:
        """Some of each kind; masks are asked for again."""
        by_kind: dict[str, list[int]] = {}
        for i, result in enumerate(evaluation.results):
            by_kind.setdefault(result["kind"], []).append(i)
        samples = []
        for places in by_kind.values():
            kept = instructive([evaluation.results[i] for i in places], max(2, count // len(by_kind)))
            samples += [self._sample(rows[places[i]], evaluation.results[places[i]], answers) for i in kept]
        return samples

    def _sample(self, row: dict, result: dict, answers: Answers) -> Sample:
        scores = {shown: result.get(key) for shown, key in (("Dice", "dice"), ("recall", "recall"), ("F1", "f1"))}
        scores = {name: value for name, value in scores.items() if value is not None}
        drawn = [answers([row])[0].masks] if row["masks"] else []
        found = [np.any([mask >= THRESHOLDS[self.compat] for mask in masks], axis=0) for masks in drawn if len(masks)]
        truth = np.any([np.asarray(mask) > 0 for mask in row["masks"]], axis=0) if row["masks"] else None
        region = None if row["region"] is None else np.asarray(row["region"])
        image = row["images"][0] if row["images"] else None
        picture = image and draw_overlay(image, found[0] if found else None, truth=truth, region=region)
        return Sample(picture, *self.shown(row), [ShownAnswer(result["model_answer"], scores, right=result["correct"])])


@dataclass
class CaptionTask(MeCoVQATask):
    """Captions of `engine.data.mecovqa.captions` (stage 1): the image alone is the prompt, which its role keeps
    out of any template, and the caption is what is learned."""

    rewards: Sequence[Reward] = field(default_factory=list)
    legend: str = ""

    def prompt(self, row: dict) -> list[Message]:
        return [{"role": "caption", "content": [{"type": "image"} for _ in row["images"]]}]

    def evaluation(self, results: list[dict]) -> Evaluation:
        """As of open questions; where answers have them (`engine.training.captions`), `loss`, in nats a token, comes first."""
        found = super().evaluation(results)
        if not all("nats" in result for result in results):
            return found
        loss = sum(result["nats"] for result in results) / sum(result["tokens"] for result in results)
        return replace(found, headline={"loss": loss, **found.headline}, measures={"loss": loss, **found.measures})
