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

    Answers to a prompt with the same tokens up to their last `<SEG>` are read and drawn once, and share their levels: sampled
    answers are often all alike. answer_mask (N, T): which tokens count. Call it in eval mode.
    """
    G = answer_ids.shape[1]
    wanted = ((answer_ids.flatten(0, 1) == policy.seg_token_id).cpu() & answer_mask.bool().cpu()).tolist()  # [N][T]
    drawn: list[list[np.ndarray]] = [[] for _ in wanted]
    alike: dict[int, dict[tuple, list[int]]] = {}  # a prompt -> (tokens, places of <SEG>) -> its answers that say so
    for answer, (ids, segs) in enumerate(zip(answer_ids.flatten(0, 1).tolist(), wanted, strict=True)):
        if places := tuple(t for t, seg in enumerate(segs) if seg):
            said = tuple(ids[: places[-1] + 1]), places
            alike.setdefault(answer // G, {}).setdefault(said, []).append(answer)
    if not alike:
        return drawn
    most, length = max(map(len, alike.values())), max(len(ids) for own in alike.values() for ids, _ in own)
    part, read = batch.select(list(alike)), torch.full((len(alike), most, length), policy.pad_token_id)
    masks: list[tuple[int, int, int, list[int]]] = []  # its prompt, its place among what is read, its token, whose it is
    for prompt, own in enumerate(alike.values()):
        for row, ((ids, places), answers) in enumerate(own.items()):
            read[prompt, row, : len(ids)] = torch.tensor(ids)
            masks += [(prompt, prompt * most + row, token, answers) for token in places]

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        states = torch.stack([hidden[row, token] for _, row, token, _ in masks])
        return policy.mask_logits(part, states, [prompt for prompt, *_ in masks])[0]

    logits = policy.model(**policy.answer_inputs(part, read.to(policy.device)), head=head)
    for (*_, answers), own_logits in zip(masks, logits, strict=True):
        levels = (own_logits.float().sigmoid() * 255).round().to(torch.uint8).cpu().numpy()
        for answer in answers:
            drawn[answer].append(levels)
    return drawn
