"""Supervised lessons for a small policy that starts from nothing."""

from collections.abc import Callable, Collection
from typing import Any

import torch

from engine.progress import progress
from engine.training.warm_up.muon import Muon
from kernels.linear_logprob import linear_logprob

Example = tuple[list[dict], list[Any], list[str]]  # a prompt, its images, and answers to it: as many in each example of a batch


def teach(
    policy: Any,
    example: Callable[[], Example],
    steps: int,
    batch_size: int,
    name: str,
    *,
    rate: float = 2e-3,
    matrix_rate: float = 0.0,
    weighty: Collection[str] = (),
) -> None:
    """Steps on batches of `example()`: matrices learn by Muon at `matrix_rate` (0: like the rest), the rest by AdamW.

    Muon finds in 300 steps what AdamW does not in 700: a letter among options, the sides of a box. The tokens that begin the texts
    of `weighty` weigh as much together as all others.
    """
    tokenizer, model = policy.processor.tokenizer, policy.model.train()
    heavy = torch.tensor([tokenizer(text).input_ids[0] for text in weighty], dtype=torch.long)
    matrices = [p for n, p in model.named_parameters() if matrix_rate and p.ndim == 2 and "embed" not in n]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = [Muon(matrices, matrix_rate)] if matrices else []
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0), *muon]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 20, 1) * max(0.05, 1 - s / (steps + 1))) for o in optimizers
    ]
    for _ in (bar := progress(range(steps), desc=name, unit="step")):
        prompts, images, answers = zip(*(example() for _ in range(batch_size)), strict=True)
        batch = policy.batch([policy.processor.encode(prompt, own) for prompt, own in zip(prompts, images, strict=True)])
        ids = tokenizer([text for group in answers for text in group], padding=True, padding_side="right", return_tensors="pt")
        targets = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)

        def head(hidden, weight, targets=targets):
            return linear_logprob(hidden.flatten(0, 1), weight, targets.flatten())[0]

        logprobs = model(**policy.answer_inputs(batch, ids.input_ids.unflatten(0, (batch_size, -1))), head=head)
        is_heavy = torch.isin(targets.flatten(), heavy)
        loss = -logprobs[targets.flatten() >= 0].mean() - logprobs[is_heavy].sum() / max(1, int(is_heavy.sum()))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
