"""Answers to attacked images: each row's image is changed as an attack will have it, and the question asked again."""

from typing import Any, Protocol

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

    `clean` is the evaluation on the unchanged ones. The attacked images of the first `save_sample_images` rows are kept in `first`,
    and some of those that changed the answer in `changed`, by the row's place in its file.
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

        attacked = self.attack(self.pixels.of(batch), loss_of)
        shown = self.pixels.put(batch, attacked)
        answers = rollout(self.policy, shown, GREEDY, num_generations=1, max_new_tokens=self.args.max_new_tokens)
        texts = answers.texts(self.policy.processor)
        self._keep(rows, texts, self.pixels.pictures(batch, attacked))
        return [Answer(text) for text in texts]

    def _target(self, row: dict) -> list[int]:
        """Token ids that the attack makes unlikely."""
        ids = self.policy.processor.text_ids(self.clean[place_of(row)])
        return (ids[:1] if self.args.compat == "reference" else ids) or self.policy.eos_token_ids[:1]

    def _keep(self, rows: list[dict], texts: list[str], pictures: list[Image.Image]) -> None:
        rest = iter(pictures)
        for row, text in zip(rows, texts, strict=True):
            picture, *_ = [next(rest) for _ in row["images"]]
            if len(self.first) < self.args.save_sample_images:
                self.first.append(picture)
            if len(self.changed) < SHOWN and text != self.clean[place_of(row)]:
                self.changed[place_of(row)] = picture


def place_of(row: dict) -> tuple[str, int]:
    """What identifies a row, or its result: the file it stands in and its number there."""
    return row["source"], row["row"]
