"""A prompt for Qwen-VL, and a batch of them: what the processor makes on the CPU, and what the model reads on its device.

Letters: B prompts, P padded prompt tokens, n patches of an image (differs by image), p side of a patch in pixels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt and its images, on the CPU.

    input_ids (P,), where each image has as many tokens as it needs; pixel_values: a tensor (n, 3*2*p*p) an image;
    image_grid_thw: a tensor (3,) an image, its patches along time, height and width; image_keys: what identifies each image across
    steps, or None.
    """

    input_ids: Tensor
    pixel_values: list[Tensor]
    image_grid_thw: list[Tensor]
    image_keys: list[str | None]

    def with_pixels(self, pixel_values: list[Tensor]) -> "EncodedPrompt":
        """The same with the pixels of its images, on any device."""
        return replace(self, pixel_values=pixel_values)

    def pin_memory(self) -> "EncodedPrompt":
        """The same in memory from which a GPU copies by itself; a data loader asks for it (`--dataloader_pin_memory`)."""
        pinned = [values.pin_memory() for values in self.pixel_values]
        return replace(self, input_ids=self.input_ids.pin_memory(), pixel_values=pinned)


@dataclass(frozen=True)
class PromptBatch:
    """B prompts padded on the left. Images are kept one tensor each, so that prompts can be selected freely.

    input_ids, attention_mask (B, P); position_ids (3, B, P) for M-RoPE; next_position (B,): where an answer's first token stands;
    image_counts: images of each prompt; pixel_values, image_grid_thw and image_keys as in `EncodedPrompt`, of all prompts in order.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    next_position: Tensor
    pixel_values: list[Tensor]
    image_grid_thw: list[Tensor]
    image_counts: list[int]
    image_keys: list[str | None]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The same batch on `device`; the grids stay on the CPU, where they are read."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            next_position=self.next_position.to(device),
            pixel_values=[x.to(device, non_blocking=True) for x in self.pixel_values],
        )

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
