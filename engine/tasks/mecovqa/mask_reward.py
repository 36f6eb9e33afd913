"""The IoU of the masks that an answer draws, as a reward: None where a row has no masks."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.rollout.grounded import draw_masks
from engine.rollout.policy import GroundingPolicy
from engine.tasks.mecovqa.masks import score_masks


def mask_reward(policy: GroundingPolicy) -> Callable[..., list[float | None]]:
    """A reward function, in TRL's form, that draws with `policy`; the answers to one prompt stand together."""

    def mask_iou(
        prompts: list, completion_ids: list[list[int]], images: list, masks: list, image_id: list | None = None, **columns: Any
    ) -> list[float | None]:
        scores: list[float | None] = [None] * len(prompts)
        keys = image_id or [None] * len(prompts)
        groups = [list(group) for _, group in itertools.groupby(range(len(prompts)), key=lambda i: id(prompts[i]))]
        groups = [group for group in groups if masks[group[0]]]
        for size in sorted({len(group) for group in groups}):
            asked = [group for group in groups if len(group) == size]
            encode = policy.processor.encode
            batch = policy.batch([encode(prompts[g[0]], images[g[0]], keys[g[0]]) for g in asked])
            flat = [i for group in asked for i in group]
            length = max(len(completion_ids[i]) for i in flat)
            ids = torch.full((len(flat), length), policy.pad_token_id)
            said = torch.zeros(len(flat), length)
            for row, i in enumerate(flat):
                ids[row, : len(completion_ids[i])] = torch.tensor(completion_ids[i])
                said[row, : len(completion_ids[i])] = 1
            drawn = draw_masks(policy, batch, ids.unflatten(0, (len(asked), size)), said)
            for i, levels in zip(flat, drawn, strict=True):
                truths = [np.asarray(mask) > 0 for mask in masks[i]]
                scores[i] = score_masks(levels, truths, "default")[1]
        return scores

    return mask_iou
