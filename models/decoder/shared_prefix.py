"""Attention over one training row per prompt: `[prompt | answer_1 | ... | answer_G]`.

Every answer attends to the prompt and to itself, never to another answer, so the hidden states and gradients equal those of
G separate rows `[prompt | answer_g]` while the prompt is computed once (the layout of PrefixGrouper and tree packing).
It plugs into Hugging Face models as the attention implementation `"shared_prefix"`, which reads a layout from the model's keyword
arguments: a `PrefixLayout` in training and prefill, the cache in a decode step; without one it is plain SDPA.
`kernels/prefix_attention.py` and `kernels/prefix_decode.py` compute it.

Letters: B prompts, G answers a prompt, P padded prompt tokens, T padded answer tokens, h query heads, k key heads, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kernels.prefix_attention import prefix_attention
from models.decoder.kv_cache import RolloutCache

ATTENTION_NAME = "shared_prefix"
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


def attend_by_prefix(config: Any) -> None:
    """Have the decoder of this configuration attend so; ValueError where it asks for dropout of attention weights."""
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise ValueError(f"attention_dropout is {dropout}: attention over shared prompts has none (expected 0 in config.json)")
    config._attn_implementation = ATTENTION_NAME


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PrefixLayout | RolloutCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B, h, P+G*T, d), key and value (B, k, P+G*T, d) -> ((B, P+G*T, h, d), None); in a decode step, whose layout is its
    cache, query (N, h, 1, d), key and value (N, k, room, d) -> ((N, 1, h, d), None).

    Follows the signature of Hugging Face attention functions; a layout says all that a mask does.
    """
    if isinstance(layout, RolloutCache):
        return layout.attend(module.layer_idx, query, key, value, scaling), None
    if layout is not None:
        return prefix_attention(query, key, value, layout.prompt_length, layout.num_answers, layout.start, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
