"""Supervised fine-tuning whose held-out measure is the loss itself, beside what the model says, as captions want."""

from dataclasses import replace
from typing import Any

import torch

from engine.data.rows import Rows
from engine.rollout.answers import Answer
from engine.rollout.policy import Policy
from engine.tasks.task import Task
from engine.training.config.sft import SFTConfig
from engine.training.sft import SFTTrainer, padded_answers
from kernels.linear_logprob import SKIP, linear_logprob


class CaptionTrainer(SFTTrainer):
    """Each answer's details have `nats`, minus the log-likelihood of the row's target, and its `tokens`."""

    def __init__(self, policy: Policy, task: Task, args: SFTConfig, rows: Rows, **options: Any) -> None:
        super().__init__(policy, task, args, rows, **options)
        self.task = task

    def answer(self, rows: list[dict]) -> list[Answer]:
        said = super().answer(rows)
        return [replace(one, details={"nats": nats, "tokens": n}) for one, (nats, n) in zip(said, self.costs(rows), strict=True)]

    @torch.no_grad()
    def costs(self, rows: list[dict]) -> list[tuple[float, int]]:
        """(nats, tokens) of the target of each row."""
        policy, encode = self.policy, self.policy.processor.encode
        prompts = policy.batch([encode(self.task.prompt(row), row["images"], row.get("image_id")) for row in rows])
        answer_ids, targets = padded_answers(policy.processor.answer_ids([self.task.target(row) for row in rows]), policy)

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_logprob(hidden.flatten(0, 1), weight.to(hidden.dtype), targets.flatten())[0]

        with self.accelerator.autocast():
            logprobs = policy.model(**policy.answer_inputs(prompts, answer_ids[:, None]), head=head)
        nats = -(logprobs.view(targets.shape) * (targets != SKIP)).sum(1)
        return list(zip(nats.tolist(), (targets != SKIP).sum(1).tolist(), strict=True))
