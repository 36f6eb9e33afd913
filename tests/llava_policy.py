"""A policy of another family than Qwen-VL, written as plainly as can be: a small random LLaVA over transformers' own cache.

No M-RoPE, no patches, no kept image features, no attention of its own: what works with both is not made for one of them.

Letters: B prompts, G answers a prompt, N = B*G, P padded prompt tokens, T answer tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from models.llava.decoding import LlavaDecoding
from models.starter.llava import build_tiny_llava

SIDE, IMAGE_TOKENS = 56, 49


@dataclass(frozen=True)
class EncodedPrompt:
    """input_ids (P,), pixel_values (images, 3, SIDE, SIDE)."""

    input_ids: Tensor
    pixel_values: Tensor


@dataclass(frozen=True)
class LlavaPrompts:
    """B prompts, padded on the left: input_ids, attention_mask (B, P); pixel_values: what each has, (images, 3, SIDE, SIDE)."""

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: list[Tensor]

    def __len__(self) -> int:
        return len(self.pixel_values)

    def select(self, rows: list[int]) -> "LlavaPrompts":
        return LlavaPrompts(self.input_ids[rows], self.attention_mask[rows], [self.pixel_values[row] for row in rows])


class LlavaProcessor:
    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.ids = tokenizer, tokenizer.get_vocab()

    def encode(self, prompt: list[dict[str, Any]], images: Sequence[Image.Image], image_key: str | None = None) -> EncodedPrompt:
        pixels = [np.asarray(image.convert("RGB").resize((SIDE, SIDE)), dtype=np.float32) / 127.5 - 1 for image in images]
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) if pixels else torch.zeros(0, 3, SIDE, SIDE)
        return EncodedPrompt(torch.tensor(self._prompt_ids(prompt)), stacked)

    def prompt_length(self, prompt: list[dict[str, Any]], image_sizes: Sequence[tuple[int, int] | None]) -> int:
        return len(self._prompt_ids(prompt))

    def own_token_in(self, prompt: list[dict[str, Any]]) -> str | None:
        return None  # texts are spelled out, see `text_ids`

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def answer_ids(self, texts: list[str]) -> list[list[int]]:
        return [[*self.text_ids(text), self.ids["</s>"]] for text in texts]

    def decode(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def _prompt_ids(self, prompt: list[dict[str, Any]]) -> list[int]:
        ids = [self.ids["<s>"]]
        for message in prompt:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                ids += [self.ids["<image>"]] * IMAGE_TOKENS if part["type"] == "image" else self.text_ids(part["text"])
        return ids


class AnsweringLlava(LlavaForConditionalGeneration):
    """A LLaVA that can also be called with prompts and answers, see `LlavaPolicy.answer_inputs`."""

    def forward(self, *args: Any, prompts: LlavaPrompts | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) if prompts is None else self._answer_forward(prompts, **kwargs)

    def read(self, prompts: LlavaPrompts, num_answers: int) -> tuple[DynamicCache, Tensor, Tensor]:
        """(their cache, repeated for every answer, its mask (N, P), the last state of each (N, 1, H))."""
        cache, pixels, mask = DynamicCache(), torch.cat(prompts.pixel_values), prompts.attention_mask
        out = self.model(
            input_ids=prompts.input_ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            pixel_values=pixels if len(pixels) else None,
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(num_answers)
        last = out.last_hidden_state[:, -1:]
        return cache, mask.repeat_interleave(num_answers, 0), last.repeat_interleave(num_answers, 0)

    def _answer_forward(self, prompts: LlavaPrompts, answer_ids: Tensor, head: Callable[[Tensor, Tensor], Any]) -> Any:
        _, G, T = answer_ids.shape
        cache, mask, last = self.read(prompts, G)
        out = self.model(
            input_ids=answer_ids.flatten(0, 1),
            attention_mask=torch.cat([mask, mask.new_ones(len(mask), T)], 1),
            position_ids=mask.sum(1, keepdim=True) + torch.arange(T, device=mask.device),
            past_key_values=cache,
            use_cache=True,
        )
        return head(torch.cat([last, out.last_hidden_state[:, :-1]], 1), self.lm_head.weight)


class LlavaPolicy:
    def __init__(self, model: AnsweringLlava, processor: LlavaProcessor):
        self.model, self.processor = model, processor

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.language_model.layers

    @property
    def repeated_layers(self) -> dict[str, nn.ModuleList]:
        return {"language model": self.layers}

    def attend_by(self, provider: str) -> None:
        if provider != "prefix":
            raise ValueError("it repeats a prompt for each of its answers")

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def eos_token_ids(self) -> list[int]:
        return [self.processor.ids["</s>"]]

    @property
    def pad_token_id(self) -> int:
        return self.processor.ids["<unk>"]

    @property
    def repetition_penalty(self) -> float:
        return 1.0

    def batch(self, encoded: list[EncodedPrompt]) -> LlavaPrompts:
        ids = pad_sequence([one.input_ids for one in encoded], True, self.pad_token_id, "left")
        mask = pad_sequence([torch.ones_like(one.input_ids) for one in encoded], True, 0, "left")
        return LlavaPrompts(ids.to(self.device), mask.to(self.device), [one.pixel_values.to(self.device) for one in encoded])

    def prefill(self, batch: LlavaPrompts, num_answers: int, max_new_tokens: int) -> tuple[LlavaDecoding, Tensor]:
        cache, mask, last = self.model.read(batch, num_answers)
        return LlavaDecoding(self.model, cache, mask), self.model.lm_head(last[:, 0]).float()

    def answer_inputs(self, batch: LlavaPrompts, answer_ids: Tensor) -> dict[str, Any]:
        return {"prompts": batch, "answer_ids": answer_ids}

    def reference(self) -> "LlavaPolicy":
        return LlavaPolicy(copy.deepcopy(self.model).requires_grad_(False).eval(), self.processor)

    def as_reference(self) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def has_auxiliary_loss(self) -> bool:
        return False

    def auxiliary_loss(self) -> Tensor | None:
        return None

    def forget_images(self) -> None:
        """It keeps none."""


def build_llava_policy(corpus: list[str], seed: int = 0) -> LlavaPolicy:
    """Random weights, spread so that answers differ; the tokenizer is trained on `corpus`."""
    tiny, tokenizer = build_tiny_llava(corpus, seed=seed)
    model = AnsweringLlava(tiny.config).eval()
    model.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return LlavaPolicy(model, LlavaProcessor(tokenizer))
