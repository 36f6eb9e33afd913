"""The key-value cache of a rollout: a prompt's keys are computed once, then copied to its G answers with room for their tokens.

On CPU the attention reads the part that is filled; with `static=True` (CUDA) it always reads the whole buffer under a mask, so that
every decode step has the same shapes and can be captured in a CUDA graph.

Letters: B prompts, G answers a prompt, N = B*G rows, P prompt tokens, k key heads, d head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RolloutLayer(CacheLayerMixin):
    """One layer's keys and values: grown by prefill to (B, k, P, d), then `expand`ed to (N, k, P + max_new_tokens, d)."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.position: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens -> those that the tokens attend to.

        Under autocast rotated keys come in float32 and values do not: attention would round the keys at every token, so they are
        kept as it takes them.
        """
        key_states = key_states.to(value_states.dtype)
        if self.keys is None or self.values is None:  # prefill
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self.length = key_states.shape[2]
            return key_states, value_states
        if self.position is not None:  # static shapes: written by index, read whole
            self.keys.index_copy_(2, self.position, key_states)
            self.values.index_copy_(2, self.position, value_states)
            return self.keys, self.values
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def expand(self, num_answers: int, max_new_tokens: int, position: Tensor | None) -> None:
        """Copy each prompt to its answers and make room for `max_new_tokens`; `position` (1,) turns static shapes on."""

        def grow(x: Tensor) -> Tensor:
            B, k, P, d = x.shape
            whole = x.new_zeros(B * num_answers, k, P + max_new_tokens, d)
            whole.view(B, num_answers, k, P + max_new_tokens, d)[:, :, :, :P] = x[:, None]
            return whole

        keys, values = self._filled()
        self.keys, self.values, self.position = grow(keys), grow(values), position

    def select(self, rows: Tensor) -> None:
        """Keep these rows (M,) only."""
        keys, values = self._filled()
        self.keys, self.values = keys[rows], values[rows]

    def _filled(self) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            raise RuntimeError("the prompts are read before their answers are decoded")
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class RolloutCache(Cache):
    """`Cache` of `RolloutLayer`s with the three verbs of a rollout: expand, advance, select."""

    def __init__(self, num_layers: int):
        self.rollout_layers = [RolloutLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.rollout_layers))
        self.position: Tensor | None = None  # (1,) where the next token goes, with static shapes

    @property
    def length(self) -> int:
        """Tokens that are filled; with static shapes those of the prompts."""
        return self.rollout_layers[0].length

    def expand(self, num_answers: int, max_new_tokens: int, *, static: bool) -> None:
        """Copy each prompt's keys to its answers, with room for `max_new_tokens` more."""
        if static:
            self.position = torch.tensor([self.length], device=self.rollout_layers[0].device)
        for layer in self.rollout_layers:
            layer.expand(num_answers, max_new_tokens, self.position)

    def advance(self) -> None:
        """After a decode step with static shapes: the next token's place, moved on the device without a host read."""
        if self.position is not None:
            self.position += 1

    def select(self, rows: Tensor) -> None:
        """Keep these rows (M,) only."""
        for layer in self.rollout_layers:
            layer.select(rows)
