"""Supervised fine-tuning of a policy that draws a mask for each `<SEG>` of its answers (LISA, MedPLIB, Uni-MedVLM's stage 3).

    loss = ce_weight CE(answer tokens) + sum over the terms of engine/training/losses/grounding.py of weight * mean over masks

Both means are over an optimizer step: tokens and masks are counted over its micro-batches and processes before the first of them
runs. Rows without masks may stand beside rows with some. The state that a mask is drawn from is that which predicts its `<SEG>`.

Letters: B prompts of a micro-batch, T answer tokens, H hidden size, M masks.
"""

from typing import Any

import numpy as np
import torch

from engine.data.rows import Rows
from engine.errors import InputError
from engine.rollout.grounded import GroundedAnswers
from engine.rollout.policy import GroundingPolicy
from engine.tasks.task import Task
from engine.training.config.grounding import GroundingConfig
from engine.training.losses.grounding import TERMS, mask_terms
from engine.training.sft import SFTTrainer


class GroundingTrainer(SFTTrainer):
    """Rows may have `masks`, [height, width] each, positive inside: one for each `<SEG>` of `task.target(row)`, in order."""

    args: GroundingConfig
    policy: GroundingPolicy

    def __init__(self, policy: GroundingPolicy, task: Task, args: GroundingConfig, rows: Rows, **options: Any) -> None:
        super().__init__(policy, task, args, rows, **options)
        self.greedy = GroundedAnswers(policy, task.prompt, args.max_completion_length)
        self.text_weight = args.ce_weight
        self.num_masks = torch.tensor(1.0)  # of the step, per process
        self.terms: list[torch.Tensor] = []  # of each micro-batch since the last log, shares of its step's
        self.num_steps = 0  # since the last log

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[list[dict]], torch.Tensor | None]:
        """As SFT's, and the step's masks are counted."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.num_steps += 1
            count = sum(len(row["masks"]) for rows in batches for row in rows)
            masks = self.accelerator.reduce(torch.tensor(float(count), device=self.args.device), "mean")
            self.num_masks = masks.where(masks > 0, 1)
        return batches, tokens

    def further_loss(self, rows: list[dict], prompts: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | float:
        """The masks' share of the step's loss."""
        args = self.args
        weights = hidden.new_tensor([getattr(args, f"{name}_weight") for name in TERMS], dtype=torch.float32)
        places = (targets == self.policy.seg_token_id).nonzero().tolist()
        masks = [mask for row in rows for mask in row["masks"]]
        said = [sum(place[0] == i for place in places) for i in range(len(rows))]
        for row, count in zip(rows, said, strict=True):
            if count != len(row["masks"]):
                raise InputError(
                    f"{row['source']}: row {row['row']}: {len(row['masks'])} masks for {count} <SEG> (expected as many of each)"
                )
        # every parameter has a gradient in every process, also where this one has no mask
        anchor = sum(p.flatten()[0] * 0.0 for p in self.model.parameters() if p.requires_grad)
        if not places:
            self.terms.append(torch.zeros(len(TERMS), device=hidden.device))
            return anchor
        states = torch.stack([hidden[row, token] for row, token in places])
        with torch.autocast(hidden.device.type, enabled=False):
            logits, iou = self.policy.mask_logits(prompts, states.float(), [row for row, _ in places])
            truths = [torch.from_numpy((np.asarray(mask) > 0).astype(np.float32)).to(hidden.device) for mask in masks]
            found = torch.stack([mask_terms(*of) for of in zip(logits, truths, iou, strict=True)])
        terms = found.sum(0) / self.num_masks.to(hidden.device)
        self.terms.append(terms.detach())
        return (terms * weights).sum() + anchor

    def step_metrics(self) -> dict[str, float]:
        metrics = super().step_metrics()
        if not self.terms:
            return metrics
        means = self.accelerator.reduce(torch.stack(self.terms).sum(0) / self.num_steps, "mean").tolist()
        self.terms.clear()
        self.num_steps = 0
        return metrics | {f"loss/{name}": mean for name, mean in zip(TERMS, means, strict=True)}
