"""A Qwen-VL as three networks to be exported: the vision tower, run once an image; prefill, once a prompt; decode, once a token.

    vision    patches [n, m*m, 3*t*p*p], positions [n, m*m, 2]  (Qwen2.5-VL: and windows [W, L], slots [n, m*m]) -> features [n, H]
    prefill   input_ids [1, T], position_ids [3, 1, T], features [f, H], caches -> logits [1, V] of the last token
    decode    input_ids [1, 1], position_ids [3, 1, 1], slots [S], caches -> logits [1, V]
    caches    a layer's keys and values each, [2, heads, capacity, d], written in place: at 0..T-1 by prefill, at S-1 by decode

The weights are Hugging Face's modules'; only what a graph cannot hold is given from outside: where patches and tokens stand, and
which patches share a window (`models.qwen.export.image_layout`). Decode attends to the caches' first S places: an answer of any
length costs what it needs, and the caches are neither moved nor made larger.

Letters: n tokens of an image, m side of the square of patches that becomes one, t and p a patch's sides in time and space, W
windows of at most L patches, T tokens of a prompt, f image tokens of a prompt, S tokens so far, H hidden size, V vocabulary, d head
size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from models.qwen.policy import QwenVL

TOWER_ATTENTION = "exported_windows_like_flash"  # transformers splits windows itself unless "flash" is part of the name
CACHE_ATTENTION = "exported_cache"


class VisionTower(nn.Module):
    """Vision tower and projector of one image, whose patches stay in their order: windows gather theirs and give them back."""

    def __init__(self, model: QwenVL):
        super().__init__()
        self.visual = model.model.visual
        self.whole = set(getattr(self.visual, "fullatt_block_indexes", range(len(self.visual.blocks))))

    def forward(self, patches: Tensor, positions: Tensor, windows: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """See the module's docstring."""
        hidden = F.linear(patches.flatten(0, 1), self.visual.patch_embed.proj.weight.flatten(1))  # its convolution's one place
        rotations = self.visual.rotary_pos_emb(hidden, positions.flatten(0, 1))
        inside = None if windows is None or slots is None else (windows, slots.flatten())
        with attention(self.visual, TOWER_ATTENTION):
            for number, block in enumerate(self.visual.blocks):
                hidden = block(
                    hidden,
                    cu_seqlens=None,
                    max_seqlen=1,
                    position_embeddings=rotations,
                    inside=None if number in self.whole else inside,
                )
        return self.visual.merger(hidden)


class Prefill(nn.Module):
    """The language model over a whole prompt, in which image tokens are replaced by the images' features, in order."""

    def __init__(self, model: QwenVL):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.image_token_id = model.config.image_token_id

    def forward(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, *caches: Tensor) -> Tensor:
        """See the module's docstring; a prompt without images is given features that nothing reads."""
        is_image = input_ids[0] == self.image_token_id
        place = (is_image.cumsum(0) - 1).clamp(0, features.shape[0] - 1)
        embeds = torch.where(is_image[:, None], features[place], self.language_model.embed_tokens(input_ids[0]))
        kept = _Cache(caches, torch.arange(input_ids.shape[1], device=input_ids.device), whole=False)
        return self.lm_head(_states(self.language_model, embeds[None], position_ids, kept)[:, -1])


class Decode(nn.Module):
    """The language model's next step: one token, which attends to itself and all before it."""

    def __init__(self, model: QwenVL):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor, slots: Tensor, *caches: Tensor) -> Tensor:
        """See the module's docstring; slots: 0..S-1."""
        kept = _Cache(caches, slots, whole=True)
        return self.lm_head(_states(self.language_model, self.language_model.embed_tokens(input_ids), position_ids, kept)[:, -1])


def _states(language_model: nn.Module, embeds: Tensor, position_ids: Tensor, cache: "_Cache") -> Tensor:
    with attention(language_model, CACHE_ATTENTION):
        out = language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask={"full_attention": None},
            past_key_values=cache,
            use_cache=True,
        )
    return out.last_hidden_state


class _Cache:
    """What transformers' layers take for a cache: each hands over its new keys and values and gets those to attend to."""

    def __init__(self, caches: tuple[Tensor, ...], slots: Tensor, *, whole: bool):
        self.caches, self.slots, self.whole = caches, slots, whole

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        kept = self.caches[layer]
        last = self.slots[-1:] if self.whole else self.slots
        kept.index_copy_(2, last, torch.cat([keys, values]))
        if not self.whole:
            return keys, values
        past = kept[:, None, :, : self.slots.shape[0]]
        return past[0], past[1]


@contextmanager
def attention(module: Any, name: str) -> Iterator[None]:
    """Inside, a Hugging Face module attends by the function of this name."""
    before = module.config._attn_implementation
    module.config._attn_implementation = name
    try:
        yield
    finally:
        module.config._attn_implementation = before


def attend_in_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    inside: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key and value (1, h, P, d) -> ((1, P, h, d), None): patches attend to all, or to those `inside` their window.

    `inside`: the patches of each window (W, L), -1 where it has fewer, and each patch's slot (P,) among these W*L.
    """
    if inside is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    windows, slots = inside
    seen = windows >= 0
    q, k, v = (x[0][:, windows.clamp(min=0)].transpose(0, 1) for x in (query, key, value))  # (W, h, L, d)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)[slots][None], None


def attend_to_cache(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """query (1, h, T, d), key and value (1, kv heads, S, d) -> ((1, T, h, d), None): a prompt's tokens attend to those before them,
    a single one to all."""
    groups = module.num_key_value_groups
    if query.shape[2] == 1:
        q = query.unflatten(1, (-1, groups)).flatten(2, 3)[0]  # (kv heads, groups, d)
        weights = (q @ key[0].transpose(1, 2) * scaling).softmax(-1)
        return (weights @ value[0]).flatten(0, 1)[None, None], None
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


AttentionInterface.register(TOWER_ATTENTION, attend_in_windows)
AttentionInterface.register(CACHE_ATTENTION, attend_to_cache)
