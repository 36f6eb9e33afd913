"""Attention over one training row per prompt: `[prompt | answer_1 | ... | answer_G]`.

Every answer attends to the prompt and to itself, never to another answer, so the hidden states and gradients equal those of
G separate rows `[prompt | answer_g]` while the prompt is computed once (the layout of PrefixGrouper and tree packing).
It plugs into Hugging Face models as the attention implementation `"shared_prefix"`; without a layout it is plain SDPA, which reads
the keys as they are cached: the query heads of a key head are taken as so many query rows.

Letters: B prompts, G answers a prompt, P padded prompt tokens, T padded answer tokens, h query heads, k key heads, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "shared_prefix"


@dataclass(frozen=True)
class PrefixLayout:
    """How rows are laid out and which keys are real; the masks are made once a forward, not once a layer.

    `prompt_bias` (B, 1, P, P) and `answer_bias` (B or 1, 1, T, P+T) are boolean, True where a query may look.
    `prompt_bias` is None where no prompt is padded: the prompt is then plainly causal.
    """

    prompt_length: int
    num_answers: int
    prompt_bias: Tensor | None
    answer_bias: Tensor


def prefix_layout(prompt_mask: Tensor, num_answers: int, answer_length: int) -> PrefixLayout:
    """The layout for left-padded prompts with `prompt_mask` (B, P) and answers of `answer_length` T tokens."""
    B, P = prompt_mask.shape
    device = prompt_mask.device
    answer_bias = torch.ones(answer_length, P + answer_length, dtype=torch.bool, device=device).tril(P)[None, None]
    if bool(prompt_mask.all()):
        return PrefixLayout(P, num_answers, None, answer_bias)
    causal = torch.ones(P, P, dtype=torch.bool, device=device).tril()
    itself = torch.eye(P, dtype=torch.bool, device=device)  # a padding query must see something, or its softmax is NaN
    keys = prompt_mask.bool()[:, None, None, :]
    real = torch.cat([keys, keys.new_ones(B, 1, 1, answer_length)], -1)
    return PrefixLayout(P, num_answers, (causal & keys) | itself, answer_bias & real)


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PrefixLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B, h, P+G*T, d), key and value (B, k, P+G*T, d) -> ((B, P+G*T, h, d), None).

    Follows the signature of Hugging Face attention functions; `layout: PrefixLayout` arrives through the model's keyword arguments.
    """
    if layout is None and query.shape[2] == 1:
        return _decode(query, key, value, attention_mask, scaling, dropout), None
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    B, _, rows, d = query.shape
    P, G = layout.prompt_length, layout.num_answers
    T = (rows - P) // G
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)

    prompt = F.scaled_dot_product_attention(
        query[:, :, :P],
        key[:, :, :P],
        value[:, :, :P],
        attn_mask=layout.prompt_bias,
        dropout_p=dropout,
        is_causal=layout.prompt_bias is None,
        scale=scaling,
    )

    def by_answer(x: Tensor) -> Tensor:  # (B, h, P+G*T, d) -> the answers, (B*G, h, T, d)
        return x[:, :, P:].unflatten(2, (G, T)).transpose(1, 2).flatten(0, 1)

    def with_prompt(x: Tensor) -> Tensor:  # (B, h, P+G*T, d) -> the prompt before each answer, (B*G, h, P+T, d)
        shared = x[:, None, :, :P].expand(-1, G, -1, -1, -1).flatten(0, 1)
        return torch.cat([shared, by_answer(x)], dim=2)

    bias = layout.answer_bias if layout.answer_bias.shape[0] == 1 else layout.answer_bias.repeat_interleave(G, 0)
    answers = F.scaled_dot_product_attention(
        by_answer(query), with_prompt(key), with_prompt(value), attn_mask=bias, dropout_p=dropout, scale=scaling
    )
    answers = answers.unflatten(0, (B, G)).permute(0, 1, 3, 2, 4).flatten(1, 2)  # (B, G*T, h, d)
    return torch.cat([prompt.transpose(1, 2), answers], dim=1), None


def _decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor:
    """One token's query (N, h, 1, d) over the cache (N, k, keys, d), `mask` (N or 1, 1, 1, keys) -> (N, 1, h, d).

    The heads that share a key head are rows of one product with it. As heads of their own they would need it h / k times over:
    a copy of the whole cache, a layer and token.
    """
    rows = query.unflatten(1, (key.shape[1], query.shape[1] // key.shape[1])).squeeze(3)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.flatten(1, 2)[:, None]


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
