"""A policy that draws masks, written as plainly as can be on `tests.llava_policy`: what works with it knows no Uni-MedVLM.

A mask is the product of a state's vector and of features of the image's pixels. Its router is one gate that looks at each prompt's
last state; nothing but the auxiliary loss moves it, so that its gradient tells how often that was added.

Letters: B prompts, M masks, S side of the pixels.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.starter.llava import build_tiny_llava
from tests.llava_policy import AnsweringLlava, EncodedPrompt, LlavaPolicy, LlavaProcessor, LlavaPrompts

CHANNELS = 8
FILE = "trained.pt"


@dataclass(frozen=True)
class SizedPrompt(EncodedPrompt):
    """With the (height, width) of its image, if it has one."""

    size: tuple[int, int] | None


@dataclass(frozen=True)
class SizedPrompts(LlavaPrompts):
    sizes: list[tuple[int, int] | None]

    def select(self, rows: list[int]) -> "SizedPrompts":
        return SizedPrompts(**vars(super().select(rows)), sizes=[self.sizes[row] for row in rows])


class SizedProcessor(LlavaProcessor):
    def encode(self, prompt: list[dict[str, Any]], images: Sequence[Image.Image], image_key: str | None = None) -> SizedPrompt:
        sizes = [image.size[::-1] for image in images] or [None]
        return SizedPrompt(**vars(super().encode(prompt, images, image_key)), size=sizes[0])


class DrawingLlava(AnsweringLlava):
    """`gate` and `draw` read states, `pixels` the image."""

    def __init__(self, config: Any):
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.gate = nn.Linear(hidden, 3, bias=False)
        self.draw, self.expect = nn.Linear(hidden, CHANNELS), nn.Linear(hidden, 1)
        self.pixels = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.routed: Tensor | None = None  # (answers, 3), of the last forward

    def read(self, prompts: LlavaPrompts, num_answers: int) -> Any:
        cache, mask, last = super().read(prompts, num_answers)
        self.routed = self.gate(last[:, 0].detach()).softmax(-1)
        return cache, mask, last

    def mask_of(self, state: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """state (H,), pixels (3, S, S) -> mask logits of `size`."""
        low = torch.einsum("c, chw -> hw", self.draw(state), self.pixels(pixels))
        return F.interpolate(low[None, None], size, mode="bilinear")[0, 0]

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save({name: own.detach() for name, own in self.named_parameters() if own.requires_grad}, Path(folder) / FILE)

    def load_trained(self, folder: str | Path) -> None:
        self.load_state_dict(torch.load(Path(folder) / FILE, weights_only=True), strict=False)


class DrawingPolicy(LlavaPolicy):
    """`balance`: what the auxiliary loss counts; None: there is none."""

    def __init__(self, model: DrawingLlava, processor: SizedProcessor, balance: float | None):
        super().__init__(model, processor)
        self.balance = balance

    @property
    def seg_token_id(self) -> int:
        return self.processor.ids["<SEG>"]

    def batch(self, encoded: list[Any]) -> SizedPrompts:
        return SizedPrompts(**vars(super().batch(encoded)), sizes=[one.size for one in encoded])

    def mask_logits(self, batch: SizedPrompts, states: Tensor, rows: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        masks = []
        for row, state in zip(rows, states, strict=True):
            if (size := batch.sizes[row]) is None:
                raise ValueError("a mask of a prompt that has no image")
            masks.append(self.model.mask_of(state, batch.pixel_values[row][0], size))
        return masks, self.model.expect(states).squeeze(-1).sigmoid()

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.balance is not None

    def auxiliary_loss(self) -> Tensor | None:
        return None if self.balance is None else self.balance * self.model.routed.square().sum(-1).mean()

    def reference(self) -> "DrawingPolicy":
        self.model.routed = None  # a tensor with a history cannot be copied
        return DrawingPolicy(copy.deepcopy(self.model).requires_grad_(False).eval(), self.processor, self.balance)


def build_drawing_policy(corpus: list[str], *, balance: float | None = None, seed: int = 0) -> DrawingPolicy:
    """Random weights, spread so that answers and masks differ; `<SEG>` is a token of its tokenizer."""
    tiny, tokenizer = build_tiny_llava(corpus, seed=seed)
    tokenizer.add_tokens(["<SEG>"])
    tiny.config.text_config.vocab_size = -(-len(tokenizer) // 8) * 8
    torch.manual_seed(seed)
    model = DrawingLlava(tiny.config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    return DrawingPolicy(model, SizedProcessor(tokenizer), balance)
