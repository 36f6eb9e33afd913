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
        self.num_masks: torch.Tensor | None = None  # of the step, per process
        self.terms: list[torch.Tensor] = []  # text and TERMS of each micro-batch since the last log, shares of its step's
        self.num_steps = 0  # since the last log

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[list[dict]], torch.Tensor | None]:
        """As SFT's, and the step's masks are counted."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.num_steps += 1
            count = sum(len(row.get("masks") or ()) for rows in batches for row in rows)
            self.num_masks = self.accelerator.reduce(torch.tensor(float(count), device=self.args.device), "mean")
        return batches, tokens

    def share_of_loss(self, of_text: torch.Tensor, rows: list[dict], prompts: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Text and masks. What is trained has a gradient, if only of zeros, also where a process has no mask in its rows: else the
        others would wait for it. (Weights that ZeRO-3 divides are empty here, and used by every row.)"""
        found = self._terms_of_masks(rows, prompts, hidden)
        terms = torch.cat([of_text[None], found])
        self.terms.append(terms.detach())
        weights = terms.new_tensor([getattr(self.args, f"{name}_weight") for name in ("ce", *TERMS)])
        return (terms * weights).sum() + sum(p.flatten()[0] * 0.0 for p in self.model.parameters() if p.requires_grad and p.numel())

    def _terms_of_masks(self, rows: list[dict], prompts: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The TERMS (4,) of the rows' masks, summed, over the number of the step's masks."""
        truths = [truth for row in rows for truth in self._truths(row)]
        if not truths:
            return hidden.new_zeros(len(TERMS), dtype=torch.float32)
        seg = self.policy.seg_token_id
        places = [(i, t) for i, row in enumerate(rows) for t, token in enumerate(row["answer_ids"]) if token == seg]
        asked, before = map(list, zip(*places, strict=True))
        with torch.autocast(hidden.device.type, enabled=False):  # sums over an image's pixels want float32
            logits, expected = self.policy.mask_logits(prompts, hidden[asked, before], asked)
            same_size: dict[tuple[int, ...], list[int]] = {}
            for place, (truth, drawn) in enumerate(zip(truths, logits, strict=True)):
                if truth.shape != drawn.shape:
                    raise InputError(f"{_named(rows[asked[place]])}: a mask of {_size(truth)} pixels on an image of {_size(drawn)}")
                same_size.setdefault(tuple(truth.shape), []).append(place)
            found = [
                mask_terms(stacked := torch.stack([logits[m] for m in own]), _stack(truths, own, stacked), expected[own])
                for own in same_size.values()
            ]
        return torch.cat(found).sum(0) / (len(truths) if self.num_masks is None else self.num_masks)

    def _truths(self, row: dict) -> list[torch.Tensor]:
        """A row's masks [height, width] of 0 and 1; InputError unless there are as many as `<SEG>` in its answer."""
        masks, said = row.get("masks") or (), row["answer_ids"].count(self.policy.seg_token_id)
        if said != len(masks):
            raise InputError(f"{_named(row)}: {len(masks)} masks for {said} <SEG> in the answer (expected as many of each)")
        return [torch.from_numpy(np.asarray(mask) > 0) for mask in masks]

    def step_metrics(self) -> dict[str, float]:
        """SFT's, and the parts of the loss, before their weights."""
        metrics = super().step_metrics()
        if not self.terms:
            return metrics
        means = self.accelerator.reduce(torch.stack(self.terms).sum(0) / self.num_steps, "mean").tolist()
        self.terms.clear()
        self.num_steps = 0
        return metrics | {f"loss/{name}": mean for name, mean in zip(("lm", *TERMS), means, strict=True)}


def _stack(truths: list[torch.Tensor], places: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.stack([truths[place] for place in places]).to(like)


def _size(mask: torch.Tensor) -> str:
    height, width = mask.shape
    return f"{width} x {height}"


def _named(row: dict) -> str:
    return f"{row['source']}: row {row['row']}"
