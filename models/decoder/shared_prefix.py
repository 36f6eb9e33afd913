"""Attention over one training row per prompt: `[prompt | answer_1 | ... | answer_G]`.

Every answer attends to the prompt and to itself, never to another answer, so the hidden states and gradients equal those of
G separate rows `[prompt | answer_g]` while the prompt is computed once (the layout of PrefixGrouper and tree packing).
It plugs into Hugging Face models as the attention implementation `"shared_prefix"`, which reads a layout from the model's keyword
arguments: a `PrefixLayout` in training and prefill, the cache in a decode step; without one it is plain SDPA.
`kernels/prefix_attention.py` and `kernels/prefix_decode.py` compute it, or in training and prefill another provider of
`kernels/prefix_providers.py`, which has an implementation of its own name.

Letters: B prompts, G answers a prompt, P padded prompt tokens, T padded answer tokens, h query heads, k key heads, d head size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kernels.prefix_providers import prefix_attention_by
from models.decoder.kv_cache import RolloutCache

# By provider. transformers takes whatever has "flash" in its name for flash attention, to which it gives no mask.
NAMES = {
    "prefix": "shared_prefix",
    "sdpa": "shared_prefix_sdpa",
    "flash": "shared_prefix_fa2",
    "xformers": "shared_prefix_xformers",
}
UNREAD_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # for a decoder that would make one itself: the layout says who sees whom


@dataclass(frozen=True)
class PrefixLayout:
    """How rows are laid out: P, G (0: prompts alone), and where each prompt starts after its padding, `start` (B,)."""

    prompt_length: int
    num_answers: int
    start: Tensor


def prefix_layout(prompt_mask: Tensor, num_answers: int) -> PrefixLayout:
    """The layout for left-padded prompts with `prompt_mask` (B, P)."""
    P = prompt_mask.shape[1]
    return PrefixLayout(P, num_answers, P - prompt_mask.sum(1))


def attend_by_prefix(config: Any, provider: str | None = None) -> None:
    """Have the decoder of this configuration attend so, by a provider of NAMES (None: as it does, by `prefix` at first).

    ValueError where it asks for dropout of attention weights.
    """
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise ValueError(f"attention_dropout is {dropout}: attention over shared prompts has none (expected 0 in config.json)")
    if provider or config._attn_implementation not in NAMES.values():
        config._attn_implementation = NAMES[provider or "prefix"]


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PrefixLayout | RolloutCache | None = None,
    provider: str = "prefix",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B, h, P+G*T, d), key and value (B, k, P+G*T, d) -> ((B, P+G*T, h, d), None); in a decode step, whose layout is its
    cache, query (N, h, 1, d), key and value (N, k, room, d) -> ((N, 1, h, d), None).

    Follows the signature of Hugging Face attention functions; a layout says all that a mask does.
    """
    if isinstance(layout, RolloutCache):
        return layout.attend(module.layer_idx, query, key, value, scaling), None
    if layout is not None:
        sizes = layout.prompt_length, layout.num_answers
        return prefix_attention_by(provider, query, key, value, *sizes, layout.start, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


for _provider, _name in NAMES.items():
    AttentionInterface.register(_name, partial(shared_prefix_attention, provider=_provider))
    AttentionMaskInterface.register(_name, sdpa_mask)
