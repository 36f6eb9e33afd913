"""Qwen2-VL and Qwen2.5-VL as policies: what a rollout and a GRPO step need, on Hugging Face's own model classes.

Papers: Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923). Nothing of the architecture is written again here: prompts are
embedded with their image features, run through the language model with our attention (`shared_prefix.py`) or cache (`kv_cache.py`),
and the language-model head is handed to the caller, who decides what to compute from it.

Letters: B prompts, G answers a prompt, N = B*G, P padded prompt tokens, T answer tokens, H hidden size, V vocabulary.
"""

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from models.qwen.decoding import Decoding
from models.qwen.kv_cache import RolloutCache
from models.qwen.processor import PROCESSOR_CLASS, QwenProcessor
from models.qwen.shared_prefix import ATTENTION_NAME, prefix_layout

FEATURE_CACHE_BYTES = 1 << 30  # about 1300 images of 196 tokens for a 3B model in bf16


@dataclass(frozen=True)
class PromptBatch:
    """B encoded prompts, left-padded. Images are kept one tensor each, so that prompts can be selected freely.

    input_ids, attention_mask (B, P); position_ids (3, B, P) for M-RoPE; next_position (B,): where an answer's first token stands;
    pixel_values: a list of (patches, 3*2*14*14); image_grid_thw: a list of (3,); image_counts: images of each prompt;
    image_keys: what identifies each image across steps, or None.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    next_position: torch.Tensor
    pixel_values: list[torch.Tensor]
    image_grid_thw: list[torch.Tensor]
    image_counts: list[int]
    image_keys: list[str | None]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device) -> "PromptBatch":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, pixel_values=[x.to(device) for x in self.pixel_values])

    def select(self, rows: list[int]) -> "PromptBatch":
        """These prompts only, without the padding they no longer need."""
        pad = int((self.attention_mask[rows] == 0).sum(1).min())
        ends = torch.tensor(self.image_counts).cumsum(0).tolist()
        images = [i for row in rows for i in range(ends[row] - self.image_counts[row], ends[row])]
        return PromptBatch(
            input_ids=self.input_ids[rows, pad:],
            attention_mask=self.attention_mask[rows, pad:],
            position_ids=self.position_ids[:, rows, pad:],
            next_position=self.next_position[rows],
            pixel_values=[self.pixel_values[i] for i in images],
            image_grid_thw=[self.image_grid_thw[i] for i in images],
            image_counts=[self.image_counts[row] for row in rows],
            image_keys=[self.image_keys[i] for i in images],
        )


class QwenVLPolicy:
    """A model and its processor behind the interface `engine.rollout.policy.Policy`."""

    def __init__(self, model: nn.Module, processor: QwenProcessor):
        self.model, self.processor = model, processor
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model  # beneath PEFT
        self.base.model.language_model.config._attn_implementation = ATTENTION_NAME
        _add_answer_forward(self.base)
        self.features = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.base.lm_head.weight.device

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends an answer: the generation config's and the tokenizer's."""
        ids = self.base.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return sorted({i for i in [*ids, self.processor.tokenizer.eos_token_id] if i is not None})

    @property
    def pad_token_id(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return pad if pad is not None else self.processor.tokenizer.eos_token_id

    def encode(self, prompts: list[list[dict]], images: list[list], image_keys: list[str | None] | None = None) -> PromptBatch:
        """Chat messages and PIL images of B prompts -> PromptBatch on the model's device. `image_keys`: one a prompt."""
        batch = self.processor(prompts, images)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        grids = batch.get("image_grid_thw")
        positions, _ = self.base.model.get_rope_index(ids, batch["mm_token_type_ids"], image_grid_thw=grids, attention_mask=mask)
        counts = [len(group) for group in images]
        keys = image_keys or [None] * len(prompts)
        encoded = PromptBatch(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            next_position=positions.masked_fill(mask == 0, -1).amax(dim=(0, 2)) + 1,
            pixel_values=list(batch["pixel_values"].split(grids.prod(-1).tolist())) if grids is not None else [],
            image_grid_thw=list(grids) if grids is not None else [],
            image_counts=counts,
            image_keys=[key and f"{key}#{i}" for key, count in zip(keys, counts, strict=True) for i in range(count)],
        )
        return encoded.to(self.device)

    def embed_images(self, batch: PromptBatch) -> torch.Tensor | None:
        """Image features (image tokens of the batch, H), or None where there is no image.

        While the vision tower is frozen, features of images with a key are kept and reused across steps.
        """
        if not batch.pixel_values:
            return None
        frozen = not any(p.requires_grad for p in self.base.model.visual.parameters())
        if not frozen or not all(batch.image_keys):
            return torch.cat(_image_features(self.base, batch.pixel_values, batch.image_grid_thw))
        keys = [(key, *grid.tolist()) for key, grid in zip(batch.image_keys, batch.image_grid_thw, strict=True)]
        missing = {key: i for i, key in enumerate(keys) if key not in self.features}
        if missing:
            with torch.no_grad():
                rows = list(missing.values())
                new = _image_features(self.base, [batch.pixel_values[i] for i in rows], [batch.image_grid_thw[i] for i in rows])
            self.features.update(zip(missing, (x.clone() for x in new), strict=True))
        for key in keys:
            self.features.move_to_end(key)
        features = torch.cat([self.features[key] for key in keys])
        while sum(x.nbytes for x in self.features.values()) > FEATURE_CACHE_BYTES:
            self.features.popitem(last=False)
        return features

    def prefill(self, batch: PromptBatch, num_answers: int, max_new_tokens: int) -> tuple[Decoding, torch.Tensor]:
        """One vision pass and one prefill a prompt -> (decoding state of N answers, logits of their first token (N, V))."""
        cache = RolloutCache(self.base.config.text_config.num_hidden_layers)
        embeds = _embed_prompt(self.base, batch.input_ids, self.embed_images(batch))
        bias = prefix_layout(batch.attention_mask, 1, 1).prompt_bias
        out = self.base.model.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            attention_mask={"full_attention": bias},
            past_key_values=cache,
            use_cache=True,
        )
        logits = self.base.lm_head(out.last_hidden_state[:, -1]).float()
        decoding = Decoding(self.base, cache, batch.attention_mask, batch.next_position, num_answers, max_new_tokens)
        return decoding, logits.repeat_interleave(num_answers, 0)

    def answer_inputs(self, batch: PromptBatch, answer_ids: torch.Tensor) -> dict:
        """Keyword arguments for `model(...)`: the shared-prefix forward of answers (B, G, T) after their prompts.

        `model(**answer_inputs, head=f)` returns `f(hidden, weight)`: the states (N, T, H) that predict each answer token, and the
        head (V, H). It is an ordinary call of the module, so DDP and PEFT wrap it as they wrap any.
        """
        frozen = not any(p.requires_grad for p in self.base.model.visual.parameters())
        return {"prompt": batch, "answer_ids": answer_ids, "image_embeds": self.embed_images(batch) if frozen else None}

    def reference(self) -> "QwenVLPolicy":
        """The frozen starting point for the KL term: a copy, or for PEFT the same weights without their adapters."""
        if self.model is not self.base:
            return _WithoutAdapters(self)
        frozen = copy.deepcopy(self.base).requires_grad_(False).eval()
        return QwenVLPolicy(frozen, self.processor)

    def as_reference(self):
        """Context in which `model(...)` computes this policy's own weights; a PEFT reference switches adapters off here."""
        return nullcontext()


class _WithoutAdapters(QwenVLPolicy):
    """The base model of a PEFT policy, seen through the same module."""

    def __init__(self, policy: QwenVLPolicy):
        vars(self).update(vars(policy))

    @contextmanager
    def as_reference(self):
        with self.model.disable_adapter():
            yield


def _add_answer_forward(model) -> None:
    """Give this Hugging Face instance one more way to be called: see `QwenVLPolicy.answer_inputs`.

    The method is bound, so that a deep copy's is bound to the copy, and keeps the signature that `generate` inspects.
    """

    @functools.wraps(type(model).forward)
    def forward(self, *args, prompt: PromptBatch | None = None, answer_ids=None, image_embeds=None, head=None, **kwargs):
        if prompt is None:
            return type(self).forward(self, *args, **kwargs)
        return _answer_forward(self, prompt, answer_ids, image_embeds, head)

    model.forward = types.MethodType(forward, model)


def _answer_forward(model, prompt: PromptBatch, answer_ids: torch.Tensor, image_embeds: torch.Tensor | None, head: Callable):
    B, G, T = answer_ids.shape
    if image_embeds is None and prompt.pixel_values:
        image_embeds = torch.cat(_image_features(model, prompt.pixel_values, prompt.image_grid_thw))
    embeds = _embed_prompt(model, prompt.input_ids, image_embeds)
    embeds = torch.cat([embeds, model.get_input_embeddings()(answer_ids.flatten(1))], dim=1)

    steps = prompt.next_position[:, None, None] + torch.arange(T, device=answer_ids.device)
    positions = torch.cat([prompt.position_ids, steps.expand(B, G, T).reshape(1, B, G * T).expand(3, -1, -1)], dim=2)

    out = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask={"full_attention": None},
        use_cache=False,
        layout=prefix_layout(prompt.attention_mask, G, T),
    )
    # The prompt's last state predicts every answer's first token; an answer's last state predicts nothing that is scored.
    P = prompt.input_ids.shape[1]
    states = out.last_hidden_state
    first = states[:, None, P - 1 : P].expand(-1, G, -1, -1)
    hidden = torch.cat([first, states[:, P:].unflatten(1, (G, T))[:, :, :-1]], dim=2).flatten(0, 1)
    return head(hidden, model.lm_head.weight)


def _image_features(model, pixel_values: list[torch.Tensor], grids: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    out = model.model.get_image_features(torch.cat(pixel_values), torch.stack(grids))
    return tuple(out.pooler_output)


def _embed_prompt(model, input_ids: torch.Tensor, image_embeds: torch.Tensor | None) -> torch.Tensor:
    """Token embeddings (B, P, H) with image features in the image tokens' places."""
    embeds = model.get_input_embeddings()(input_ids)
    if image_embeds is None:
        return embeds
    places = (input_ids == model.config.image_token_id)[..., None].expand_as(embeds)
    return embeds.masked_scatter(places, image_embeds.to(embeds.dtype))


def load_qwen_vl(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str = "main",
) -> QwenVLPolicy:
    """Load a checkpoint folder or hub name. Pixel limits are areas; `attn_implementation` is that of the vision tower.

    Raises ValueError where the checkpoint is no Qwen2-VL or Qwen2.5-VL, OSError where it cannot be read.
    """
    config = AutoConfig.from_pretrained(path, revision=revision)
    if config.model_type not in PROCESSOR_CLASS:
        kind = "a text-only checkpoint" if not hasattr(config, "vision_config") else "another kind of vision-language model"
        raise ValueError(f"{path}: {kind} (model_type '{config.model_type}'); a Qwen2-VL or Qwen2.5-VL checkpoint is needed")
    if "sliding_attention" in (config.text_config.layer_types or []):
        raise ValueError(f"{path}: sliding-window attention (use_sliding_window) is not supported")
    processor = QwenProcessor.from_pretrained(path, config.model_type, min_pixels=min_pixels, max_pixels=max_pixels)
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation, revision=revision
    )
    return QwenVLPolicy(model, processor)
