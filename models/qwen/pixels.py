"""Qwen-VL's image input as ordinary pixels and back, differentiably: what an attack on an image changes.

The image processor cuts a resized image into patches of p x p pixels, normalises each channel, and repeats each patch for two
moments in time: `pixel_values` (n, 3 * 2 * p * p). Here an image is its patches (n, 3, p, p) in 0-1, once.

Letters: n patches of an image, p side of a patch in pixels, m side of the square of patches that becomes one token.
"""

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from models.qwen.prompts import PromptBatch


class QwenPixels:
    """For the patches that `image_processor` makes. `mean` and `std` (3, 1, 1) are those of its normalisation, in 0-1."""

    def __init__(self, image_processor: Qwen2VLImageProcessorPil):
        self.patch: int = image_processor.patch_size
        self.times: int = image_processor.temporal_patch_size
        self.merge: int = image_processor.merge_size
        self.mean, self.std = (
            torch.tensor(channels)[:, None, None] for channels in (image_processor.image_mean, image_processor.image_std)
        )

    def of(self, batch: PromptBatch) -> list[Tensor]:
        """The images of a batch, each (n, 3, p, p) in 0-1."""
        return [self._unpack(values)[:, :, 0] * self.std.to(values) + self.mean.to(values) for values in batch.pixel_values]

    def put(self, batch: PromptBatch, pixels: list[Tensor]) -> PromptBatch:
        """The same prompts about these images instead, which have no keys: features kept of the former ones are not theirs."""
        values = [self._pack((x - self.mean.to(x)) / self.std.to(x)) for x in pixels]
        return replace(batch, pixel_values=values, image_keys=[None] * len(values))

    def pictures(self, batch: PromptBatch, pixels: list[Tensor]) -> list[Image.Image]:
        """These images, in the sizes of the batch's own, as files would keep them: one picture an image."""
        return [self._picture(x, grid) for x, grid in zip(pixels, batch.image_grid_thw, strict=True)]

    def _picture(self, pixels: Tensor, grid: Tensor) -> Image.Image:
        _, rows, columns = grid.tolist()
        m = self.merge
        squares = pixels.unflatten(0, (rows // m, columns // m, m, m))  # then 3, p, p
        whole = squares.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * self.patch, columns * self.patch, 3)
        return Image.fromarray((whole * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy())

    def _unpack(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (3, self.times, self.patch, self.patch))

    def _pack(self, patches: Tensor) -> Tensor:
        return patches[:, :, None].expand(-1, -1, self.times, -1, -1).flatten(1)
