"""A policy once more with its float32 weights in a shorter type, to be sampled from under autocast: half the bytes to read at every
token, nothing for autocast to cast, and weights that stay where they are, so that CUDA graphs of decode steps outlive a rollout.
"""

import copy
from typing import Any

import torch
from torch import nn

from engine.rollout.policy import Policy


class RoundedCopy:
    """`policy` answers with weights of `dtype`; `refresh()` makes them those that `of` has now.

    Weights of `of` in any other type than float32 are shared with it, and so is its processor. What is kept of images is not: to
    a tower of rounded weights they look otherwise. Buffers, such as the frequencies of positions, keep their type.
    """

    def __init__(self, of: Policy, dtype: torch.dtype):
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # what is rounded, and the rounded
        memo: dict[int, Any] = {id(of.processor): of.processor}
        for weight in of.model.parameters():
            memo[id(weight)] = weight
            if weight.dtype == torch.float32:
                memo[id(weight)] = nn.Parameter(weight.detach().to(dtype), weight.requires_grad)
                self._pairs.append((weight, memo[id(weight)]))
        self.policy: Policy = copy.deepcopy(of, memo)
        self.policy.model.eval()
        self._buffers = [*zip(of.model.buffers(), self.policy.model.buffers(), strict=True)]

    @torch.no_grad()
    def refresh(self) -> None:
        """After an optimizer step or a checkpoint was loaded."""
        for weight, rounded in (*self._pairs, *self._buffers):
            rounded.copy_(weight)
