"""What PRS-Med's networks read: questions and answers as tokens, images for CLIP and for the SAM encoder, masks as targets.

    tokens    <s> [image tokens] \\n### User: {question} \\n### Assistant: \\n | {answer} </s>      padded on the right
    CLIP      padded to a square with its mean colour, the image in the middle, bicubic to its input size, its statistics
    encoder   both sides stretched to S, bilinear, ImageNet statistics
    mask      stretched to S, bilinear, above one half

Training and inference have the same prompt, tokenised on its own, so that its states do not depend on what follows.
`compat`: see `models.prs_med`.

Shape letters: B batch, T tokens, S side of the encoder's input and of the masks, s side of CLIP's.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaConfig, PreTrainedTokenizerBase

from models.sam.frame import Frame
from models.sam.sam import PIXEL_MEAN, PIXEL_STD
from models.views import View

PROMPT = "\n### User: {question} \n### Assistant: \n"
REFERENCE_LENGTH = 512  # tokens, <s> and the image (one, before it becomes its tokens) included
REFERENCE_INFERENCE_PROMPT = "\n### User: As a doctor, and you are seeing the image, {question}\n"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100


class PRSMedProcessor:
    """`llava_config` is the VLM's `LlavaConfig`; `image_size` is S."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, llava_config: LlavaConfig, image_size: int, compat: str = "default"):
        self.tokenizer, self.image_size, self.compat = tokenizer, image_size, compat
        vision: Any = llava_config.vision_config
        self.clip_size: int = vision.image_size
        self.image_ids = [tokenizer.bos_token_id] + [llava_config.image_token_id] * llava_config.image_seq_length
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def prompts(self, images: list[Image.Image], questions: list[str]) -> dict[str, Tensor]:
        """Keyword arguments of `PRSMed.forward` for questions without answers."""
        template = REFERENCE_INFERENCE_PROMPT if self.compat == "reference" else PROMPT
        rows = [self.image_ids + self._tokens(template.format(question=question)) for question in questions]
        return self._batch(rows, [len(row) for row in rows]) | self._images(images)

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """Rows of a masked question set -> keyword arguments of `PRSMed.forward`, masks [B, 1, S, S] in 0-1 and class_labels [B]
        (-100 where a row has none)."""
        return self.collate_without_images(rows) | self._images([row["image"] for row in rows])

    @property
    def views(self) -> dict[str, View]:
        """What `collate` makes of an image, by the keyword."""
        fill = tuple(int(255 * mean) for mean in CLIP_MEAN)
        mean, std = ([value / 255 for value in values] for values in (PIXEL_MEAN, PIXEL_STD))
        return {
            "pixel_values": View(lambda height, width: (self.clip_size,) * 2, CLIP_MEAN, CLIP_STD, fill=fill),
            "images": View(lambda height, width: (self.image_size,) * 2, tuple(mean), tuple(std), bicubic=False),
        }

    def collate_without_images(self, rows: list[dict]) -> dict[str, Tensor]:
        """`collate` without what `views` says how to make."""
        sequences, prompt_lengths, labels = [], [], []
        for row in rows:
            prompt, answer = self._texts(row["question"], row["answer"])
            start = len(self.image_ids)
            sequences.append(self.image_ids + prompt + answer)
            prompt_lengths.append(start + len(prompt))
            counted = prompt if self.compat == "reference" else [IGNORED] * len(prompt)
            labels.append([IGNORED] * start + counted + answer)
        batch = self._batch(sequences, prompt_lengths)
        if self.compat == "reference":
            batch["prompt_mask"] = torch.ones_like(batch["prompt_mask"])
        return batch | {
            "labels": _padded(labels, IGNORED),
            "masks": torch.stack([self._mask(row["mask"]) for row in rows]),
            "class_labels": torch.tensor([IGNORED if row["label"] is None else row["label"] for row in rows]),
        }

    def decode(self, ids: list[int]) -> str:
        """The text of an answer, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def frame(self, image: Image.Image) -> Frame:
        """How the image lies in the encoder's input, and a mask over that in the image."""
        return Frame.fit((image.height, image.width), self.image_size, "stretch")

    def _texts(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        prompt = PROMPT.format(question=question)
        if self.compat == "reference":
            return self._tokens(prompt + answer)[: REFERENCE_LENGTH - 2], []
        return self._tokens(prompt), self._tokens(answer) + [self.tokenizer.eos_token_id]

    def _tokens(self, text: str) -> list[int]:
        """Text as text: what looks like a special token is spelled out."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _batch(self, rows: list[list[int]], prompt_lengths: list[int]) -> dict[str, Tensor]:
        ids = _padded(rows, self.pad_id)
        places = torch.arange(ids.shape[1])
        lengths = torch.tensor([len(row) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": (places < lengths[:, None]).long(),
            "prompt_mask": places < torch.tensor(prompt_lengths)[:, None],
        }

    def _images(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([self._clip(image.convert("RGB")) for image in images]),
            "images": torch.stack([self._encoder_input(image.convert("RGB")) for image in images]),
        }

    def _clip(self, image: Image.Image) -> Tensor:
        """[3, s, s]."""
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in CLIP_MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        pixels = np.asarray(square.resize((self.clip_size, self.clip_size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        return torch.from_numpy(((pixels - CLIP_MEAN) / CLIP_STD).astype(np.float32)).permute(2, 0, 1)

    def _encoder_input(self, image: Image.Image) -> Tensor:
        """[3, S, S]."""
        mean, std = (torch.tensor(x)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
        return (self.frame(image).resize(np.asarray(image)) - mean) / std

    def _mask(self, mask: Image.Image) -> Tensor:
        """[1, S, S]."""
        resized = mask.convert("L").resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        soft = torch.from_numpy(np.array(resized, dtype=np.float32)[None] / 255)
        return soft if self.compat == "reference" else (soft > 0.5).float()


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
