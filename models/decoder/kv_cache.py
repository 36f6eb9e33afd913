"""The key-value cache of a rollout: a prompt's keys are there once, and each of its answers has room for its own tokens.

`kernels/prefix_decode.py` attends to both. Every decode step has the same shapes, whatever is filled, so that on CUDA it can be
captured in a graph.

Letters: B prompts, G answers a prompt, N rows (B*G, or those that are left), P prompt tokens, k key heads, d head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kernels.prefix_decode import prefix_decode


class RolloutLayer(CacheLayerMixin):
    """One layer's keys and values: `prompt_keys` (B, k, P, d) of prefill; after `expand` also `keys` (N, k, max_new_tokens, d)."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.position: Tensor | None = None
        self.prompt_keys: Tensor | None = None
        self.prompt_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the keys and values of new tokens -> the prompts' in prefill, later the answers' with all of their room.

        Under autocast rotated keys come in float32 and values do not: attention would round the keys at every token, so they are
        kept as it takes them.
        """
        key_states = key_states.to(value_states.dtype)
        if self.keys is None or self.values is None or self.position is None:  # prefill
            self.lazy_initialization(key_states, value_states)
            self.prompt_keys, self.prompt_values, self.length = key_states, value_states, key_states.shape[2]
            return key_states, value_states
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def expand(self, num_answers: int, max_new_tokens: int, position: Tensor) -> None:
        """Make room for `max_new_tokens` of each answer, the next at `position` (1,), which is moved from outside."""
        keys, values = self.prompts()
        B, k, _, d = keys.shape
        self.position = position
        self.keys, self.values = (x.new_empty(B * num_answers, k, max_new_tokens, d) for x in (keys, values))

    def share(self, other: "RolloutLayer", rows: int) -> None:
        """Be the first `rows` answers of another layer, in its memory."""
        self.prompt_keys, self.prompt_values, self.length = other.prompt_keys, other.prompt_values, other.length
        self.position, (keys, values) = other.position, other.answers()
        self.keys, self.values = keys[:rows], values[:rows]
        self.lazy_initialization(keys, values)

    def widen(self, length: int) -> None:
        """Copy the prompts to the end of room for `length` tokens each."""
        keys, values = self.prompts()
        self.prompt_keys, self.prompt_values = (x.new_zeros(*x.shape[:2], length, x.shape[3]) for x in (keys, values))
        self.length = length
        self.refill(keys, values)

    def refill(self, keys: Tensor, values: Tensor) -> None:
        """Take in other prompts (B, k, P, d), of at most as many tokens as there is room for."""
        for own, others in zip(self.prompts(), (keys, values), strict=True):
            own[:, :, own.shape[2] - others.shape[2] :].copy_(others)

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Their keys and values, each (B, k, P, d)."""
        if self.prompt_keys is None or self.prompt_values is None:
            raise RuntimeError("the prompts are read before their answers are decoded")
        return self.prompt_keys, self.prompt_values

    def answers(self) -> tuple[Tensor, Tensor]:
        """Their keys and values with all of their room, each (N, k, max_new_tokens, d)."""
        if self.keys is None or self.values is None:
            raise RuntimeError("there is no room for answers before `expand`")
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class RolloutCache(Cache):
    """`Cache` of `RolloutLayer`s with the verbs of a rollout: expand, attend, advance, select; and, to be used again for others'
    prompts, widen and refill."""

    def __init__(self, num_layers: int):
        self.rollout_layers = [RolloutLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.rollout_layers))

    def expand(self, prompt_mask: Tensor, num_answers: int, max_new_tokens: int) -> None:
        """After prefill of left-padded prompts with `prompt_mask` (B, P): room for `max_new_tokens` of G answers to each."""
        B, P = prompt_mask.shape
        self.num_answers = num_answers
        self.start = P - prompt_mask.sum(1)  # (B,) where each prompt begins after its padding
        self.prompts = torch.arange(B, device=prompt_mask.device).repeat_interleave(num_answers)  # (N,) ascending
        self.bounds = torch.arange(B + 1, device=prompt_mask.device) * num_answers  # (B+1,) rows of a prompt: from, to before
        self.position = torch.zeros(1, dtype=torch.long, device=prompt_mask.device)  # of the next token within an answer
        for layer in self.rollout_layers:
            layer.expand(num_answers, max_new_tokens, self.position)

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """query (N, h, 1, d) of the newest tokens over their prompts and answers, whose keys `update` returned -> (N, 1, h, d)."""
        prompts = self.rollout_layers[layer].prompts()
        places = (self.bounds, self.start, self.position)
        return prefix_decode(query, *prompts, keys, values, *places, scale=scale, most_rows=self.num_answers)

    def advance(self) -> None:
        """After a decode step: the next token's place, moved on the device without a host read."""
        self.position += 1

    def select(self, rows: Tensor) -> None:
        """Keep these rows (M,) only, which ascend: they become the first ones, in the same memory."""
        self.prompts = self.prompts[rows]
        self.bounds.copy_(torch.searchsorted(self.prompts, torch.arange(len(self.bounds), device=rows.device)))
        for layer in self.rollout_layers:
            for states in layer.answers():
                states[: len(rows)] = states[rows]

    def first(self, rows: int) -> "RolloutCache":
        """A cache of the first `rows` answers, in the same memory, that sees what is later written there."""
        part = RolloutCache(len(self.rollout_layers))
        part.num_answers, part.start, part.bounds, part.position = self.num_answers, self.start, self.bounds, self.position
        for own, layer in zip(part.rollout_layers, self.rollout_layers, strict=True):
            own.share(layer, rows)
        return part

    def widen(self, length: int) -> None:
        """Room for prompts of `length` tokens, at whose end those that are there come to lie."""
        P = self.rollout_layers[0].length
        for layer in self.rollout_layers:
            layer.widen(length)
        self.start = self.start + (length - P)

    def refill(self, other: "RolloutCache", prompt_mask: Tensor) -> None:
        """Begin anew, after `widen`, with as many other prompts as a prefill of them left in `other`; their mask (B, P)."""
        self.start.copy_(self.rollout_layers[0].length - prompt_mask.sum(1))
        self.prompts = torch.arange(len(prompt_mask), device=prompt_mask.device).repeat_interleave(self.num_answers)
        self.bounds.copy_(torch.arange(len(self.bounds), device=prompt_mask.device) * self.num_answers)
        self.position.zero_()
        for layer, theirs in zip(self.rollout_layers, other.rollout_layers, strict=True):
            layer.refill(*theirs.prompts())
