"""Text and images to tensors for Qwen2-VL and Qwen2.5-VL, with no torchvision.

Hugging Face's own processor needs torchvision for its video half even where only images are used; this one wraps the same tokenizer
and the same (Pillow) image processor and saves the file set of Qwen's own repositories.
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

IMAGE_TOKEN = "<|image_pad|>"
PROCESSOR_CLASS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}


class QwenProcessor:
    """`tokenizer`, `image_processor` and chat template of one checkpoint; `model_type` is that of its config."""

    def __init__(self, tokenizer, image_processor, model_type: str):
        self.tokenizer, self.image_processor, self.model_type = tokenizer, image_processor, model_type
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @classmethod
    def from_pretrained(cls, path: str, model_type: str, *, min_pixels: int | None = None, max_pixels: int | None = None):
        """Pixel limits are areas in pixels; None keeps the checkpoint's. Raises OSError where files are missing."""
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        size = dict(image_processor.size)
        size["shortest_edge"] = min_pixels or size["shortest_edge"]
        size["longest_edge"] = max_pixels or size["longest_edge"]
        image_processor.size = type(image_processor.size)(**size)
        template_file = Path(path) / "chat_template.json"
        if template_file.is_file():
            tokenizer.chat_template = json.loads(template_file.read_text())["chat_template"]
        if not tokenizer.chat_template:
            raise ValueError(f"{path}: the tokenizer has no chat template; an instruction-tuned checkpoint is needed")
        return cls(tokenizer, image_processor, model_type)

    def prompt_length(self, prompt: list[dict], sizes: list[tuple[int, int] | None]) -> int:
        """Tokens of a prompt with images of these (height, width) in pixels; None stands for the largest an image can become."""
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        side = self.image_processor.patch_size * self.image_processor.merge_size
        length = len(self.tokenizer(text, add_special_tokens=False).input_ids) - len(sizes)
        for size in sizes:
            if size is None:
                length += self.image_processor.size["longest_edge"] // side**2
            else:
                length += self.image_processor.get_number_of_image_patches(*size) // self.image_processor.merge_size**2
        return length

    def __call__(self, prompts: list[list[dict]], images: list[list]) -> dict[str, torch.Tensor]:
        """Chat messages and their PIL images -> input_ids, attention_mask, mm_token_type_ids (B, P), left-padded; and
        pixel_values (patches, 3*2*14*14), image_grid_thw (images, 3) where there are images.

        Raises ValueError where a prompt's image places and its images differ in number.
        """
        flat = [image for group in images for image in group]
        vision = dict(self.image_processor(images=flat, return_tensors="pt")) if flat else {}
        tokens = iter((vision["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist() if flat else [])
        texts = []
        for prompt, group in zip(prompts, images, strict=True):
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            pieces = text.split(IMAGE_TOKEN)
            if len(pieces) - 1 != len(group):
                raise ValueError(f"a prompt has {len(pieces) - 1} image places and {len(group)} images")
            texts.append("".join(piece + IMAGE_TOKEN * next(tokens) for piece in pieces[:-1]) + pieces[-1])
        batch = self.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        is_image = (batch["input_ids"] == self.image_token_id).int()
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "mm_token_type_ids": is_image, **vision}

    def answer_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each answer and of the end token after it: what a model learns to say."""
        return [[*ids, self.tokenizer.eos_token_id] for ids in self.tokenizer(texts, add_special_tokens=False).input_ids]

    def decode(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save_pretrained(self, folder: str, **kwargs) -> None:
        """Qwen's own set of files: the tokenizer's, vocab.json, merges.txt, preprocessor_config.json, chat_template.json."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)  # the template in tokenizer_config.json, as Qwen has it
        self.tokenizer.backend_tokenizer.model.save(str(folder))
        self.image_processor.save_pretrained(folder)
        config_file = folder / "preprocessor_config.json"
        config = json.loads(config_file.read_text())
        config |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": PROCESSOR_CLASS[self.model_type]}
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": self.tokenizer.chat_template}, indent=2) + "\n")
