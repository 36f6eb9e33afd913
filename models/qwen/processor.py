"""Text and images to tensors for Qwen2-VL and Qwen2.5-VL, with no torchvision.

Hugging Face's own processor needs torchvision for its video half even where only images are used; this one wraps the same tokenizer
and the same (Pillow) image processor and saves the file set of Qwen's own repositories.
"""

import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from models.checkpoint import CheckpointError, read_json, reading
from models.qwen.prompts import EncodedPrompt
from models.tokenizer import load_tokenizer
from models.views import View

IMAGE_TOKEN = "<|image_pad|>"
MAX_ASPECT = 200  # Qwen's: the longer side is at most so many shorter ones
TEMPLATE_FILE = "chat_template.json"
PIXEL_FILES = ("preprocessor_config.json", "processor_config.json")  # Qwen's, and that of transformers 5
PROCESSOR_CLASS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}

Message = dict[str, Any]  # of a chat: role, and content as text or as a list of texts and image places


class QwenProcessor:
    """`tokenizer`, `image_processor` and chat template of one checkpoint; `model_type` is that of its config."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor: Qwen2VLImageProcessorPil, model_type: str):
        self.tokenizer, self.image_processor, self.model_type = tokenizer, image_processor, model_type

    @classmethod
    def from_pretrained(
        cls, path: str | Path, config: Any, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Self:
        """Pixel limits are areas in pixels; None keeps the checkpoint's. `config`: of the model that it is for.

        Raises CheckpointError, which names the file, for one that is missing, damaged, or of another model.
        """
        folder = Path(path)
        tokenizer = load_tokenizer(folder, config, padding_side="left")
        file = next((folder / name for name in PIXEL_FILES if (folder / name).exists()), folder / PIXEL_FILES[0])
        read_json(file)
        with reading(file):
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
            size = dict(image_processor.size)
            size["shortest_edge"] = min_pixels or size["shortest_edge"]
            size["longest_edge"] = max_pixels or size["longest_edge"]
            image_processor.size = type(image_processor.size)(**size)
            if size["shortest_edge"] > size["longest_edge"]:
                raise CheckpointError(f"min_pixels {size['shortest_edge']} is more than max_pixels {size['longest_edge']}")
            _check_pixels(image_processor, config.vision_config, file)
        if (folder / TEMPLATE_FILE).exists():
            tokenizer.chat_template = read_json(folder / TEMPLATE_FILE).get("chat_template")
        if not isinstance(tokenizer.chat_template, str):
            raise CheckpointError(f"{path}: the tokenizer has no chat template; an instruction-tuned checkpoint is needed")
        return cls(tokenizer, image_processor, config.model_type)

    def encode(self, prompt: list[Message], images: Sequence[Image.Image], image_key: str | None = None) -> EncodedPrompt:
        """Chat messages and their images -> what `QwenVLPolicy.batch` takes. `image_key` identifies the images across steps.

        Raises ValueError where the messages' image places and the images differ in number.
        """
        pieces = self._pieces(prompt, len(images))
        return self._encoded(pieces, *self._patches(images), image_key)

    def encode_sizes(self, prompt: list[Message], sizes: Sequence[tuple[int, int]], image_key: str | None = None) -> EncodedPrompt:
        """The same of images (height, width), without `pixel_values`: `EncodedPrompt.with_pixels` brings them, made by `view`."""
        pieces = self._pieces(prompt, len(sizes))
        patch, resized = self.image_processor.patch_size, self.view.resized
        grids = [torch.tensor([1, *(side // patch for side in resized(*size))]) for size in sizes]
        return self._encoded(pieces, [], grids, image_key)

    def _pieces(self, prompt: list[Message], images: int) -> list[str]:
        pieces = self._text(prompt).split(IMAGE_TOKEN)
        if len(pieces) - 1 != images:
            raise ValueError(f"a prompt has {len(pieces) - 1} image places and {images} images")
        return pieces

    @property
    def view(self) -> View:
        """What `encode` makes of an image."""
        own = self.image_processor

        def resized(height: int, width: int) -> tuple[int, int]:
            least, most = own.size["shortest_edge"], own.size["longest_edge"]
            return smart_resize(height, width, own.patch_size * own.merge_size, min_pixels=least, max_pixels=most)

        patch = (own.patch_size, own.merge_size, own.temporal_patch_size)
        return View(resized, tuple(own.image_mean), tuple(own.image_std), patch=patch)

    def _encoded(
        self, pieces: list[str], pixel_values: list[torch.Tensor], grids: list[torch.Tensor], image_key: str | None
    ) -> EncodedPrompt:
        tokens = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in grids]
        text = "".join(piece + IMAGE_TOKEN * count for piece, count in zip(pieces, [*tokens, 0], strict=True))
        return EncodedPrompt(
            input_ids=torch.tensor(self.text_ids(text), dtype=torch.long),
            pixel_values=pixel_values,
            image_grid_thw=grids,
            image_keys=[f"{image_key}#{i}" if image_key else None for i in range(len(grids))],
        )

    def prompt_length(self, prompt: list[Message], image_sizes: Sequence[tuple[int, int] | None]) -> int:
        """Tokens of a prompt whose images have these (height, width) in pixels; None: as many as an image can have."""
        length = len(self.text_ids(self._text(prompt))) - len(image_sizes)
        for size in image_sizes:
            if size is None:
                length += self._most_tokens()
            else:
                length += self.image_processor.get_number_of_image_patches(*size) // self.image_processor.merge_size**2
        return length

    def own_token_in(self, prompt: list[Message]) -> str | None:
        """The first of the tokenizer's special tokens in a prompt's texts, or None: it would be read as a token, not as text."""
        contents = [message["content"] for message in prompt]
        texts = [[text] if isinstance(text, str) else [part.get("text", "") for part in text] for text in contents]
        found = self._special_tokens.search("\n".join(text for parts in texts for text in parts))
        return found[0] if found else None

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a text as the model would write it; special tokens are read as such."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answer_ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each answer and the end token after it: what a model learns to say."""
        return [[*ids, self.tokenizer.eos_token_id] for ids in self.tokenizer(texts, add_special_tokens=False).input_ids]

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Texts without special tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Qwen's own set of files: the tokenizer's, vocab.json, merges.txt, preprocessor_config.json, chat_template.json."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)  # the template in tokenizer_config.json, as Qwen has it
        self.tokenizer.backend_tokenizer.model.save(str(folder))
        self.image_processor.save_pretrained(folder)
        config_file = folder / "preprocessor_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": PROCESSOR_CLASS[self.model_type]}
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / TEMPLATE_FILE).write_text(
            json.dumps({"chat_template": self.tokenizer.chat_template}, indent=2) + "\n", encoding="utf-8"
        )

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, {*special, IMAGE_TOKEN})))

    def _text(self, prompt: list[Message]) -> str:
        return str(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))

    def _most_tokens(self) -> int:
        """An upper bound of the tokens of an image: of a strip, where the limits are small, more than its area has."""
        side = self.image_processor.patch_size * self.image_processor.merge_size
        least, most = (self.image_processor.size[edge] / side**2 for edge in ("shortest_edge", "longest_edge"))
        enlarged = least + math.sqrt(least) * (math.sqrt(MAX_ASPECT) + 1 / math.sqrt(MAX_ASPECT)) + 1  # both sides rounded up
        return int(max(most, math.sqrt(MAX_ASPECT * most), enlarged))

    def _patches(self, images: Sequence[Image.Image]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`pixel_values` and `image_grid_thw` of `EncodedPrompt`."""
        if not images:
            return [], []
        vision = self.image_processor(images=list(images), return_tensors="pt")
        grids = vision["image_grid_thw"]
        return list(vision["pixel_values"].split(grids.prod(-1).tolist())), list(grids)


def _check_pixels(image_processor: Any, vision: Any, file: Path) -> None:
    """Raise CheckpointError where patches are not those of the vision tower, or normalised to what is not finite."""
    for name, own in [("patch_size", "patch_size"), ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size")]:
        value, expected = getattr(image_processor, name), getattr(vision, own)
        if value != expected:
            raise CheckpointError(f"{file}: {name} is {str(value)[:20]}, and {expected} in config.json")
    mean, std = (
        torch.tensor(channels, dtype=torch.float32) for channels in (image_processor.image_mean, image_processor.image_std)
    )
    if not (mean.shape == std.shape == (3,) and mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise CheckpointError(f"{file}: image_mean and image_std: expected three numbers each, and deviations above 0")
