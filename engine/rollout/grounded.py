"""Answers with the masks that they draw: greedy text first, then one more pass over it for the states before each `<SEG>`.

Letters: B prompts, G answers a prompt, N = B * G, T answer tokens.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.rollout.answers import Answer, GreedyAnswers
from engine.rollout.policy import GroundingPolicy, Message, Policy
from engine.rollout.rollout import rollout


class GroundedAnswers(GreedyAnswers):
    """Each answer's `masks`: levels uint8 [height, width] in the image's size, one for each `<SEG>` of its text, in order."""

    policy: GroundingPolicy

    def __call__(self, rows: list[dict]) -> list[Answer]:
        policy, encode = self.policy, self.policy.processor.encode
        batch = policy.batch([encode(self.prompt_of(row), row["images"], row.get("image_id")) for row in rows])
        seeds = [self.seed_of(row) for row in rows]
        said = rollout(policy, batch, self.sampling, num_generations=1, max_new_tokens=self.max_new_tokens, seeds=seeds)
        has_image = torch.tensor([[bool(row["images"])] for row in rows], device=said.completion_mask.device)
        drawn = draw_masks(policy, batch, said.completion_ids[:, None], said.completion_mask * has_image)
        texts = said.texts(policy.processor)
        return [Answer(text, masks=tuple(masks)) for text, masks in zip(texts, drawn, strict=True)]


def greedy_answers(policy: Policy, prompt_of: Callable[[dict], list[Message]], max_new_tokens: int) -> GreedyAnswers:
    """Greedy answers, with their masks where the policy draws some."""
    return (GroundedAnswers if hasattr(policy, "seg_token_id") else GreedyAnswers)(policy, prompt_of, max_new_tokens)


@torch.no_grad()
def draw_masks(policy: GroundingPolicy, batch: Any, answer_ids: torch.Tensor, answer_mask: torch.Tensor) -> list[list[np.ndarray]]:
    """The masks of answers (B, G, T) to the prompts of `batch`: of each of the N answers its masks' levels, in order.

    answer_mask (N, T): which tokens count. Call it in eval mode.
    """
    _, G, T = answer_ids.shape
    answer_ids = answer_ids.to(policy.device)
    wanted = (answer_ids.flatten(0, 1) == policy.seg_token_id) & answer_mask.to(policy.device).bool()  # (N, T)
    drawn: list[list[np.ndarray]] = [[] for _ in range(len(wanted))]
    prompts = wanted.unflatten(0, (-1, G)).any(2).any(1).nonzero().flatten().tolist()  # that have a mask to be drawn
    if not prompts:
        return drawn
    length = int(wanted.any(0).nonzero().max()) + 1
    chosen, part = wanted.unflatten(0, (-1, G))[prompts].flatten(0, 1), batch.select(prompts)
    places = chosen.nonzero().tolist()

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        states = torch.stack([hidden[answer, token] for answer, token in places])
        return policy.mask_logits(part, states, [answer // G for answer, _ in places])[0]

    logits = policy.model(**policy.answer_inputs(part, answer_ids[prompts, :, :length].contiguous()), head=head)
    for (answer, _), own in zip(places, logits, strict=True):
        levels = (own.float().sigmoid() * 255).round().to(torch.uint8).cpu().numpy()
        drawn[prompts[answer // G] * G + answer % G].append(levels)
    return drawn
