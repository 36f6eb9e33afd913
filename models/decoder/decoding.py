"""The state of N answers while they are decoded, one token a step, over the cache of their prompts.

On CUDA the step is captured once in a CUDA graph and replayed; on CPU the same step runs as it is. The graph reads the weights
where they lie. Under autocast that is where autocast keeps its casts of trained weights until its end, which a rollout does not
outlive. Frozen float32 weights it casts anew at every use, so a step with such weights is not captured, nor is one that waits for
the device.

Letters: B prompts, G answers a prompt, N = B*G rows (fewer once finished rows are dropped), P prompt tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.decoder.kv_cache import RolloutCache
from models.decoder.shared_prefix import UNREAD_MASK

WARM_UP_STEPS = 2  # eager steps before capture: libraries allocate their workspaces in them


@dataclass(frozen=True)
class LanguageModel:
    """`decoder`: the layers, called as those of Hugging Face; `embed`: ids (N, 1) -> (N, 1, H); `head`: (N, H) -> logits (N, V),
    by `head_weight`; `axes`: along how many a token has a position; `mask`: what the layers take as a mask, and do not read;
    `waits`: the host reads from the device within a step, as a mixture of experts does, so that no CUDA graph can hold one."""

    decoder: nn.Module
    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    head_weight: Tensor
    axes: int = 1
    mask: Any = UNREAD_MASK
    waits: bool = False


def casts_weights(model: LanguageModel, device_type: str) -> bool:
    """Whether each decode step casts weights: under autocast those in float32 that it does not keep its casts of."""
    if not torch.is_autocast_enabled(device_type):
        return False
    weights = [*model.decoder.parameters(), model.head_weight]
    kept = torch.is_autocast_cache_enabled()
    return any(weight.dtype == torch.float32 and not (kept and weight.requires_grad) for weight in weights)


class Decoding:
    """`step(token_ids)` appends a token to every row and returns the next logits; `select(rows)` drops rows."""

    def __init__(
        self,
        model: LanguageModel,
        cache: RolloutCache,
        prompt_mask: Tensor,
        next_position: Tensor,
        num_answers: int,
        max_new_tokens: int,
    ):
        self.model, self.cache = model, cache
        self.capturable = model.head_weight.is_cuda and not model.waits and not casts_weights(model, "cuda")
        cache.expand(prompt_mask, num_answers, max_new_tokens)
        self.position = next_position.repeat_interleave(num_answers)
        self.token_ids = torch.zeros_like(self.position)
        self.steps = 0
        self.captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None  # a step, and the logits it writes

    def step(self, token_ids: Tensor) -> Tensor:
        """token_ids (N,) -> logits of the token after them, (N, V) float32."""
        self.token_ids.copy_(token_ids)
        self.steps += 1
        if self.capturable and self.captured is None and self.steps > WARM_UP_STEPS:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward()
            self.captured = graph, logits
        if self.captured is None:
            return self._forward()
        graph, logits = self.captured
        graph.replay()
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows (M,) only; they ascend."""
        self.cache.select(rows)
        self.position, self.token_ids = self.position[rows], self.token_ids[rows]
        self.captured, self.steps = None, 0

    def _forward(self) -> Tensor:
        position = self.position[:, None]
        out = self.model.decoder(
            inputs_embeds=self.model.embed(self.token_ids[:, None]),
            position_ids=position if self.model.axes == 1 else position.expand(self.model.axes, -1, 1),
            attention_mask=self.model.mask,
            past_key_values=self.cache,
            use_cache=True,
            layout=self.cache,
        )
        self.position += 1
        self.cache.advance()
        return self.model.head(out.last_hidden_state[:, -1]).float()
