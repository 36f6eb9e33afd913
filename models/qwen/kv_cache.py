"""The key-value cache of a rollout: a prompt's keys are computed once, then copied to its G answers with room for their tokens.

On CPU the attention reads the part that is filled; with `static=True` (CUDA) it always reads the whole buffer under a mask, so that
every decode step has the same shapes and can be captured in a CUDA graph.

Letters: B prompts, G answers a prompt, N = B*G rows, P prompt tokens, k key heads, d head size.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class RolloutLayer(CacheLayerMixin):
    """One layer's keys and values: grown by prefill to (B, k, P, d), then `expand`ed to (N, k, P + max_new_tokens, d)."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.length = 0
        self.position = None

    def lazy_initialization(self, key_states, value_states):
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:  # prefill
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self.length = key_states.shape[2]
            return self.keys, self.values
        if self.position is not None:  # static shapes: written by index, read whole
            self.keys.index_copy_(2, self.position, key_states)
            self.values.index_copy_(2, self.position, value_states)
            return self.keys, self.values
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def expand(self, num_answers: int, max_new_tokens: int, position: torch.Tensor | None) -> None:
        """Copy each prompt to its answers and make room for `max_new_tokens`; `position` (1,) turns static shapes on."""

        def grow(x):
            B, k, P, d = x.shape
            whole = x.new_zeros(B * num_answers, k, P + max_new_tokens, d)
            whole.view(B, num_answers, k, P + max_new_tokens, d)[:, :, :, :P] = x[:, None]
            return whole

        self.keys, self.values, self.position = grow(self.keys), grow(self.values), position

    def select(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class RolloutCache(Cache):
    """`Cache` of `RolloutLayer`s with the three verbs of a rollout: expand, advance, select."""

    def __init__(self, num_layers: int):
        super().__init__(layers=[RolloutLayer() for _ in range(num_layers)])
        self.position = None

    def expand(self, num_answers: int, max_new_tokens: int, *, static: bool) -> None:
        first = self.layers[0]
        if static:
            self.position = torch.tensor([first.length], device=first.device)
        for layer in self.layers:
            layer.expand(num_answers, max_new_tokens, self.position)

    def advance(self) -> None:
        """After a decode step with static shapes: the next token's place, moved on the device without a host read."""
        if self.position is not None:
            self.position += 1

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (M,) only."""
        for layer in self.layers:
            layer.select(rows)
