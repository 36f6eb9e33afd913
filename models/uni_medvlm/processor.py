"""Text, images and regions to tensors for Uni-MedVLM.

An image becomes as many `<image>` tokens as its views have patches, a region `<region>`, one token for its vector, `</region>`. The
prompt is written by the tokenizer's chat template, or LLaVA's where it has none. What has the role `caption` stands alone, without
a template: the image and a line break, as stage 1 trains on captions, after the start token where prompts have one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from models.sam.frame import Frame, as_pixels
from models.sam.sam import Sam, normalised
from models.uni_medvlm.encoder.hybrid_encoder import HybridEncoder
from models.uni_medvlm.encoder.pixels import hybrid_pixels
from models.uni_medvlm.encoder.tiling import CANVASES, Layout
from models.uni_medvlm.prompts import EncodedPrompt, ImageInputs
from models.uni_medvlm.regions import patch_weights
from models.uni_medvlm.tokens import IMAGE, NEW_TOKENS, REGION, REGION_END, REGION_FEATURE, SEG

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
CAPTION = "caption"  # a role
MOST_VIEWS = max(columns * rows for columns, rows in CANVASES) + 1

Message = dict[str, Any]  # of a chat: role, and content as text or as a list of parts: text, image, region with its mask


@dataclass(frozen=True)
class Sizes:
    """What the towers read, in pixels, patches of a ViT's side, and how the mask decoder's image is normalised."""

    vit: int
    convnext: int
    grid: int
    sam: int
    sam_normalisation: str = "imagenet"

    @classmethod
    def of(cls, encoder: HybridEncoder, sam: Sam) -> "Sizes":
        """Those of the networks."""
        vit: Any = encoder.vision_tower.config
        grid = vit.image_size // vit.patch_size
        return cls(vit.image_size, encoder.convnext_size, grid, sam.image_size, sam.normalisation)


class UniMedProcessor:
    """`tokenizer` gets NEW_TOKENS unless it has them; they are no special tokens of it, so that an answer keeps its `<SEG>`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, tiling: bool = False, compat: str = "default"):
        tokenizer.add_tokens([token for token in NEW_TOKENS if token not in tokenizer.get_vocab()])
        self.tokenizer, self.sizes, self.tiling, self.compat = tokenizer, sizes, tiling, compat
        self.ids = {token: int(tokenizer.get_vocab()[token]) for token in NEW_TOKENS}

    def encode(self, prompt: list[Message], images: Sequence[Image.Image], image_key: str | None = None) -> EncodedPrompt:
        """Chat messages and their image, at most one -> what `UniMedPolicy.batch` takes.

        ValueError where the messages' image places and the images differ in number, or a region is not one of the image.
        """
        parts = _parts(prompt)
        places, masks = sum(part["type"] == "image" for part in parts), [p["mask"] for p in parts if p["type"] == "region"]
        if places != len(images) or places > 1:
            raise ValueError(f"a prompt has {places} image places and {len(images)} images: expected one of each, or none")
        if masks and not images:
            raise ValueError("a prompt has a region, and no image that it lies on")
        for mask in masks:
            if mask.size != images[0].size:
                (width, height), (w, h) = mask.size, images[0].size
                raise ValueError(f"a region of {width} x {height} pixels on an image of {w} x {h}")
        image = self._image(images[0], masks, image_key) if images else None
        views = len(image.views.images_vit) if image else 0
        return EncodedPrompt(torch.tensor(self._expanded(self.text_ids(self._text(prompt)), views), dtype=torch.long), image)

    def prompt_length(self, prompt: list[Message], image_sizes: Sequence[tuple[int, int] | None]) -> int:
        """Tokens of a prompt whose images have these (height, width) in pixels; None: as many as an image can have."""
        length = len(self.text_ids(self._text(prompt)))
        for size in image_sizes:
            views = 1 if not self.tiling else Layout.fit(size[::-1]).num_views if size else MOST_VIEWS
            length += views * self.sizes.grid**2 - 1
        return length

    def own_token_in(self, prompt: list[Message]) -> str | None:
        """The first of the model's own tokens in a prompt's texts, or None: it would be read as a token, not as text."""
        found = self._own_tokens.search("\n".join(part["text"] for part in _parts(prompt) if part["type"] == "text"))
        return found[0] if found else None

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a text as the model would write it; its own tokens are read as such."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answer_ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each answer and the end token after it: what the model learns to say."""
        return [[*ids, self.tokenizer.eos_token_id] for ids in map(self.text_ids, texts)]

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Texts with `<SEG>`, without all other tokens of the model's own."""
        unsaid = {id for token, id in self.ids.items() if token != SEG}
        said = [[id for id in row if id not in unsaid] for row in ids]
        return self.tokenizer.batch_decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """The tokenizer's files."""
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def _own_tokens(self) -> re.Pattern[str]:
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, {*special, *NEW_TOKENS})))

    def _text(self, prompt: list[Message]) -> str:
        messages = [{"role": message["role"], "content": _written(_parts([message]))} for message in prompt]
        if messages[0]["role"] == CAPTION:
            return self._start + str(messages[0]["content"])
        if self.tokenizer.chat_template:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        system = "".join(f"{message['content']} " for message in messages if message["role"] == "system")
        text = (self.tokenizer.bos_token or "") + (system or SYSTEM)
        for role, said in [(message["role"], message["content"]) for message in messages if message["role"] != "system"]:
            text += f"USER: {said} ASSISTANT:" if role == "user" else f" {said}{self.tokenizer.eos_token}"
        return text

    @cached_property
    def _start(self) -> str:
        """The start token, where prompts begin with it: language models attend to it, so a caption's has it too."""
        start = self.tokenizer.bos_token or ""
        return start if self._text([{"role": "user", "content": "?"}]).startswith(start) else ""

    def _expanded(self, ids: list[int], views: int) -> list[int]:
        place, patches = self.ids[IMAGE], views * self.sizes.grid**2
        return [id for one in ids for id in ([place] * patches if one == place else [one])]

    def _image(self, image: Image.Image, masks: list[Image.Image], key: str | None) -> ImageInputs:
        sizes = self.sizes
        views = hybrid_pixels(image, tiling=self.tiling, vit_size=sizes.vit, convnext_size=sizes.convnext)
        box = Layout.fit(image.size).global_box(sizes.vit) if self.tiling else (0, 0, sizes.vit, sizes.vit)
        frame = Frame.fit(image.size[::-1], sizes.sam, "centre")
        pixels = frame.pad(normalised(frame.resize(as_pixels(image)), sizes.sam_normalisation))
        regions = [patch_weights(mask, box, sizes.vit, sizes.grid, self.compat) for mask in masks]
        return ImageInputs(views, pixels, frame, regions, key)


def _parts(prompt: list[Message]) -> list[dict[str, Any]]:
    contents = [message["content"] for message in prompt]
    return [part for c in contents for part in ([{"type": "text", "text": c}] if isinstance(c, str) else c)]


def _written(parts: list[dict[str, Any]]) -> str:
    region = f"{REGION}{REGION_FEATURE}{REGION_END}"
    return "".join({"image": f"{IMAGE}\n", "region": region}.get(part["type"]) or part["text"] for part in parts)
