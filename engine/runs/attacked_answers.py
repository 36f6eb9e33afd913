"""Answers to attacked images: each row's image is changed as an attack will have it, and the question asked again.

A result says how far the attack went: `logprob_drop`, by how much log p(its target | prompt) fell, in nats; `linf` and `l2`, the
largest and the Euclidean change of its images, of values in 0-1.
"""

from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.command.evaluation_settings import AttackArguments
from engine.evaluation.attacks import Attack, target_losses
from engine.rollout.answers import Answer
from engine.rollout.policy import Policy
from engine.rollout.rollout import rollout
from engine.rollout.sampling import GREEDY
from engine.tasks.evaluation import Evaluation
from engine.tasks.task import Task

SHOWN = 12  # attacked images in the report


class Pixels(Protocol):
    """How a model's encoded images are images again. `std` (3, 1, 1): the standard deviation of each channel, in 0-1."""

    std: Tensor

    def of(self, batch: Any) -> list[Tensor]:
        """The images of a prompt batch in 0-1."""

    def put(self, batch: Any, pixels: list[Tensor]) -> Any:
        """The same prompts about other images."""

    def pictures(self, batch: Any, pixels: list[Tensor]) -> list[Image.Image]:
        """Images of the batch, or changed ones, as files would keep them."""


class AttackedAnswers:
    """Answers to rows about attacked images.

    `clean` is the evaluation on the unchanged ones. The attacked images of the first `save_sample_images` rows are kept in `first`.
    Of some that changed the answer there is a strip in `changed`, by the row's place in its file: the image, the attacked one, and
    their difference times 10 around grey.
    """

    def __init__(self, policy: Policy, pixels: Pixels, attack: Attack, task: Task, clean: Evaluation, args: AttackArguments):
        self.policy, self.pixels, self.attack, self.task, self.args = policy, pixels, attack, task, args
        self.clean = {place_of(result): result["model_output"] for result in clean.results}
        self.first: list[Image.Image] = []
        self.changed: dict[tuple[str, int], Image.Image] = {}

    def __call__(self, rows: list[dict]) -> list[Answer]:
        encode = self.policy.processor.encode
        batch = self.policy.batch([encode(self.task.prompt(row), row["images"]) for row in rows])
        targets = [self._target(row) for row in rows]
        prompts = torch.tensor([i for i, row in enumerate(rows) for _ in row["images"]], device=self.policy.device)

        def loss_of(images: list[Tensor]) -> Tensor:
            return target_losses(self.policy, self.pixels.put(batch, images), targets)[prompts]

        images = self.pixels.of(batch)
        attacked = self.attack(images, loss_of)
        shown = self.pixels.put(batch, attacked)
        answers = rollout(self.policy, shown, GREEDY, num_generations=1, max_new_tokens=self.args.max_new_tokens)
        texts = answers.texts(self.policy.processor)
        with torch.no_grad():
            drops = target_losses(self.policy, shown, targets) - target_losses(self.policy, batch, targets)
        changes = iter([(y - x).float() for x, y in zip(images, attacked, strict=True)])
        self._keep(rows, texts, self.pixels.pictures(batch, images), self.pixels.pictures(batch, attacked))
        return [
            Answer(text, details={"logprob_drop": drop, **norms([next(changes) for _ in row["images"]])})
            for row, text, drop in zip(rows, texts, drops.tolist(), strict=True)
        ]

    def _target(self, row: dict) -> list[int]:
        """Token ids that the attack makes unlikely."""
        ids = self.policy.processor.text_ids(self.clean[place_of(row)])
        return (ids[:1] if self.args.compat == "reference" else ids) or self.policy.eos_token_ids[:1]

    def _keep(self, rows: list[dict], texts: list[str], images: list[Image.Image], attacked: list[Image.Image]) -> None:
        pairs = zip(images, attacked, strict=True)
        for row, text in zip(rows, texts, strict=True):
            (image, changed), *_ = [next(pairs) for _ in row["images"]]
            if len(self.first) < self.args.save_sample_images:
                self.first.append(changed)
            if len(self.changed) < SHOWN and text != self.clean[place_of(row)]:
                self.changed[place_of(row)] = strip(image, changed)


def norms(changes: list[Tensor]) -> dict[str, float]:
    """linf and l2 of a row's images, changed by these much."""
    flat = torch.cat([change.flatten() for change in changes])
    return {"linf": float(flat.abs().max()), "l2": float(flat.norm())}


def strip(image: Image.Image, changed: Image.Image) -> Image.Image:
    """The image, the changed one, and ten times their difference around grey, side by side."""
    pair = [np.asarray(each.convert("RGB"), dtype=np.int16) for each in (image, changed)]
    difference = (128 + 10 * (pair[1] - pair[0])).clip(0, 255)
    gap = np.full((pair[0].shape[0], max(2, pair[0].shape[1] // 50), 3), 255)
    return Image.fromarray(np.concatenate([pair[0], gap, pair[1], gap, difference], axis=1).astype(np.uint8))


def place_of(row: dict) -> tuple[str, int]:
    """What identifies a row, or its result: the file it stands in and its number there."""
    return row["source"], row["row"]
