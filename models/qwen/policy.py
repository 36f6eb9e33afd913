"""Qwen2-VL and Qwen2.5-VL as policies: what a rollout and a GRPO step need, on Hugging Face's own model classes.

Papers: Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923). Nothing of the architecture is written again here: prompts are
embedded with their image features, run through the language model with the attention or the cache of `models/decoder/`, and the
language-model head is handed to the caller, who decides what to compute from it.

Letters: B prompts, G answers a prompt, N = B*G, P padded prompt tokens, T answer tokens, H hidden size, V vocabulary.
"""

import copy
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from models.checkpoint import CheckpointError, find_folder, reading
from models.decoder.decoding import Decoding, LanguageModel, Rooms
from models.decoder.feature_cache import FeatureCache
from models.decoder.kv_cache import RolloutCache
from models.decoder.shared_prefix import attend_by_prefix, prefix_layout
from models.decoder.starting_point import StartingPoint
from models.lora import beneath_adapters, has_effect
from models.pretrained import four_bits, load_config, load_model, read_config
from models.qwen.processor import IMAGE_TOKEN, QwenProcessor
from models.qwen.prompts import EncodedPrompt, PromptBatch
from models.qwen.vision_windows import WINDOWS_NAME
from models.tokenizer import check_vocabulary

QwenVL = Qwen2VLForConditionalGeneration | Qwen2_5_VLForConditionalGeneration
MODEL_CLASSES: dict[Any, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}
FEATURE_CACHE_BYTES = 1 << 30  # about 1300 images of 196 tokens for a 3B model in bf16


class QwenVLPolicy:
    """A Qwen-VL model, or that within PEFT, and its processor: fulfils `engine.rollout.policy.Policy`."""

    def __init__(self, model: nn.Module, processor: QwenProcessor):
        self.model, self.processor = model, processor
        self.base: QwenVL = beneath_adapters(model)
        attend_by_prefix(self.base.model.language_model.config)
        if self.base.model.visual.config._attn_implementation == "sdpa":
            self.base.model.visual.config._attn_implementation = WINDOWS_NAME
        _add_answer_forward(self.base)
        self.features, self.rooms = FeatureCache(FEATURE_CACHE_BYTES), Rooms()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.base.lm_head.weight.device

    @property
    def layers(self) -> nn.ModuleList:
        """The language model's."""
        return self.base.model.language_model.layers

    @property
    def repeated_layers(self) -> dict[str, nn.ModuleList]:
        """The language model's and the vision tower's."""
        return {"language model": self.layers, "vision tower": self.base.model.visual.blocks}

    def attend_by(self, provider: str) -> None:
        """Have its language model attend by another of `kernels.prefix_providers.PROVIDERS`."""
        attend_by_prefix(self.base.model.language_model.config, provider)

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends an answer: the generation config's and the tokenizer's."""
        ids = self.base.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return sorted({i for i in [*ids, self.processor.tokenizer.eos_token_id] if i is not None})

    @property
    def pad_token_id(self) -> int:
        """What stands before shorter prompts and after shorter answers."""
        pad = self.processor.tokenizer.pad_token_id
        return pad if pad is not None else self.processor.tokenizer.eos_token_id

    @property
    def repetition_penalty(self) -> float:
        """The generation config's, which `generate` applies too; 1: none."""
        return self.base.generation_config.repetition_penalty or 1.0

    def batch(self, encoded: list[EncodedPrompt]) -> PromptBatch:
        """What `processor.encode` made of B prompts, on the model's device."""
        ids = pad_sequence([one.input_ids for one in encoded], True, self.pad_token_id, "left")
        mask = pad_sequence([torch.ones_like(one.input_ids) for one in encoded], True, 0, "left")
        grids = [grid for one in encoded for grid in one.image_grid_thw]
        positions, _ = self.base.model.get_rope_index(
            ids,
            ids.eq(self.base.config.image_token_id).int(),
            image_grid_thw=torch.stack(grids) if grids else None,
            attention_mask=mask,
        )
        return PromptBatch(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            next_position=positions.masked_fill(mask == 0, -1).amax(dim=(0, 2)) + 1,
            pixel_values=[values for one in encoded for values in one.pixel_values],
            image_grid_thw=grids,
            image_counts=[len(one.pixel_values) for one in encoded],
            image_keys=[key for one in encoded for key in one.image_keys],
        ).to(self.device)

    def embed_images(self, batch: PromptBatch) -> Tensor | None:
        """Image features (image tokens of the batch, H), or None where there is no image.

        While the vision tower is frozen, features of images with a key are kept and reused across steps.
        """
        if not batch.pixel_values:
            return None
        if not self._vision_is_frozen or not all(batch.image_keys):
            return torch.cat(_image_features(self.base, batch.pixel_values, batch.image_grid_thw))

        @torch.no_grad()
        def compute(places: list[int]) -> tuple[Tensor, ...]:
            values, grids = ([part[i] for i in places] for part in (batch.pixel_values, batch.image_grid_thw))
            return _image_features(self.base, values, grids)

        keys = [(key, *grid.tolist()) for key, grid in zip(batch.image_keys, batch.image_grid_thw, strict=True)]
        return torch.cat(self.features.of(keys, compute))

    def forget_images(self) -> None:
        """Drop kept image features: the weights have changed from outside."""
        self.features.clear()

    @property
    def _vision_is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.base.model.visual.parameters())

    def prefill(self, batch: PromptBatch, num_answers: int, max_new_tokens: int) -> tuple[Decoding, Tensor]:
        """One vision pass and one prefill a prompt -> (decoding state of N answers, logits of their first token (N, V))."""
        cache = RolloutCache(len(self.base.model.language_model.layers))
        embeds = _embed_prompt(self.base, batch.input_ids, self.embed_images(batch))
        out = self.base.model.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            attention_mask={"full_attention": None},
            past_key_values=cache,
            use_cache=True,
            layout=prefix_layout(batch.attention_mask, 0),
        )
        logits = self.base.lm_head(out.last_hidden_state[:, -1]).float()
        begun = (cache, batch.attention_mask, batch.next_position, num_answers, max_new_tokens)
        return self.rooms.begin(language_model(self.base), *begun), logits.repeat_interleave(num_answers, 0)

    def answer_inputs(self, batch: PromptBatch, answer_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments for `model(...)`: the shared-prefix forward of answers (B, G, T) after their prompts.

        `model(**answer_inputs, head=f)` returns `f(hidden, weight)`: the states (N, T, H) that predict each answer token, and the
        head (V, H). It is an ordinary call of the module, so DDP and PEFT wrap it as they wrap any.
        """
        features = self.embed_images(batch) if self._vision_is_frozen else None
        return {"prompt": batch, "answer_ids": answer_ids, "image_embeds": features}

    @property
    def has_auxiliary_loss(self) -> bool:
        return False

    def auxiliary_loss(self) -> None:
        """It has no experts."""
        return None

    def reference(self) -> "QwenVLPolicy":
        """The frozen starting point for the KL term: a copy; for PEFT the base, and where adapters are trained further, as in TRL,
        these as they are."""
        if isinstance(self.model, PeftModel):
            return (_AdaptersAsTheyWere if has_effect(self.model) else _WithoutAdapters)(self, self.model)
        frozen = copy.deepcopy(self.base).requires_grad_(False).eval()
        return QwenVLPolicy(frozen, self.processor)

    def as_reference(self) -> AbstractContextManager[None]:
        """Context in which `model(...)` computes with this policy's own weights: a PEFT reference switches adapters off here."""
        return nullcontext()


class _WithoutAdapters(QwenVLPolicy):
    """The base model of a PEFT policy, seen through the same module."""

    def __init__(self, policy: QwenVLPolicy, model: PeftModel):
        vars(self).update(vars(policy))
        self._adapted = model
        if any(".visual." in name and ".lora_" in name for name, _ in model.named_parameters()):
            self.features = FeatureCache(FEATURE_CACHE_BYTES)  # images look otherwise to it

    def as_reference(self) -> AbstractContextManager[None]:
        return self._adapted.disable_adapter()


class _AdaptersAsTheyWere(_WithoutAdapters):
    """A PEFT policy with the trained parameters that it had when this was made: they take their places in `as_reference`."""

    def __init__(self, policy: QwenVLPolicy, model: PeftModel):
        super().__init__(policy, model)
        self._start = StartingPoint(model)

    def as_reference(self) -> AbstractContextManager[None]:
        return self._start.in_place()


def language_model(model: QwenVL) -> LanguageModel:
    """What of it decodes."""
    head, embedding = model.lm_head, model.get_input_embeddings()
    return LanguageModel(model.model.language_model, embedding, head, head.weight, axes=3, mask={"full_attention": None})


def _add_answer_forward(model: QwenVL) -> None:
    """Give this Hugging Face instance one more way to be called: see `QwenVLPolicy.answer_inputs`.

    The method is bound, so that a deep copy's is bound to the copy, and keeps the signature that `generate` inspects.
    """

    @functools.wraps(type(model).forward)
    def forward(
        self: QwenVL,
        *args: Any,
        prompt: PromptBatch | None = None,
        answer_ids: Any = None,
        image_embeds: Tensor | None = None,
        head: Any = None,
        **kwargs: Any,
    ) -> Any:
        if prompt is None:
            return type(self).forward(self, *args, **kwargs)
        return _answer_forward(self, prompt, answer_ids, image_embeds, head)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def _answer_forward(
    model: QwenVL,
    prompt: PromptBatch,
    answer_ids: Tensor,
    image_embeds: Tensor | None,
    head: Callable[[Tensor, Tensor], Any],
) -> Any:
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
        layout=prefix_layout(prompt.attention_mask, G),
    )
    # The prompt's last state predicts every answer's first token; an answer's last state predicts nothing that is scored.
    P = prompt.input_ids.shape[1]
    states = out.last_hidden_state
    first = states[:, None, P - 1 : P].expand(-1, G, -1, -1)
    hidden = torch.cat([first, states[:, P:].unflatten(1, (G, T))[:, :, :-1]], dim=2).flatten(0, 1)
    return head(hidden, model.lm_head.weight)


def _image_features(model: QwenVL, pixel_values: list[Tensor], grids: list[Tensor]) -> tuple[Tensor, ...]:
    out = model.model.get_image_features(torch.cat(pixel_values), torch.stack(grids))
    return tuple(out.pooler_output)


def _embed_prompt(model: QwenVL, input_ids: Tensor, image_embeds: Tensor | None) -> Tensor:
    """Token embeddings (B, P, H) with image features in the image tokens' places."""
    embeds = model.get_input_embeddings()(input_ids)
    if image_embeds is None:
        return embeds
    places = (input_ids == model.config.image_token_id)[..., None].expand_as(embeds)
    return embeds.masked_scatter(places, image_embeds.to(embeds.dtype))


def load_qwen_vl(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str = "main",
    load_in_4bit: bool = False,
    processor: str | Path | None = None,
) -> QwenVLPolicy:
    """Load a checkpoint folder or hub name. Pixel limits are areas; `attn_implementation` is that of the vision tower.

    With `load_in_4bit` the language model's linear layers are quantized as in QLoRA. `processor`: the folder of tokenizer and image
    processor, if it is another one.
    Raises CheckpointError where the checkpoint is no whole Qwen2-VL or Qwen2.5-VL, OSError where there is none.
    """
    folder = find_folder(path, revision)
    settings = read_config(folder)
    kind = settings.get("model_type")
    if kind not in MODEL_CLASSES:
        what = "another kind of vision-language model" if "vision_config" in settings else "a text-only checkpoint"
        raise CheckpointError(f"{path}: {what} (model_type {str(kind)[:40]!r}); a Qwen2-VL or Qwen2.5-VL checkpoint is needed")
    config_class, model_class = MODEL_CLASSES[kind]
    config = load_config(config_class, settings, folder)
    if "sliding_attention" in (config.text_config.layer_types or []):
        raise CheckpointError(f"{path}: sliding-window attention (use_sliding_window) is not supported")
    quantized: dict[str, Any] = {"quantization_config": four_bits(["lm_head", "model.visual"])} if load_in_4bit else {}
    source = Path(processor or folder)
    own = QwenProcessor.from_pretrained(source, config, min_pixels=min_pixels, max_pixels=max_pixels)
    special = {IMAGE_TOKEN: config.image_token_id, "<|vision_start|>": config.vision_start_token_id}
    check_vocabulary(own.tokenizer, config.text_config.vocab_size, source, special=special)
    model = load_model(model_class, folder, config, dtype=dtype, attn_implementation=attn_implementation, **quantized)
    with reading(path):
        policy = QwenVLPolicy(model, own)
    _try_out(policy, path)
    return policy


@torch.no_grad()
def _try_out(policy: QwenVLPolicy, path: str | Path) -> None:
    """One token after one small image: CheckpointError where settings and weights do not go together, or weights are not finite."""
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    tower = policy.base.model.visual.config
    attention = tower._attn_implementation
    with reading(path):
        _check_generation(policy)
        try:
            tower._attn_implementation = "sdpa"  # flash attention needs a GPU, where the weights are not yet
            batch = policy.batch([policy.processor.encode(prompt, [Image.new("RGB", (56, 56), "gray")])])
            decoding, logits = policy.prefill(batch, 1, 1)
            logits = logits + decoding.step(logits.argmax(-1))
        finally:
            tower._attn_implementation = attention
    if not logits.isfinite().all():
        raise CheckpointError(f"{path}: computes logits that are not finite: are its weights?")


def _check_generation(policy: QwenVLPolicy) -> None:
    """Raise CheckpointError where generation_config.json has what neither ends nor weighs tokens."""
    ends, penalty = policy.eos_token_ids, policy.base.generation_config.repetition_penalty
    if not all(type(end) is int and 0 <= end < policy.base.lm_head.weight.shape[0] for end in ends):
        raise CheckpointError(f"generation_config.json: eos_token_id makes {str(ends)[:60]} the end tokens: expected ids of tokens")
    if not (penalty is None or (isinstance(penalty, (int, float)) and penalty > 0)):
        raise CheckpointError(f"generation_config.json: repetition_penalty is {str(penalty)[:20]!r}: expected a number above 0")
