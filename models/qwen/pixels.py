"""Qwen-VL's image input as ordinary pixels and back, differentiably: what an attack on an image changes.

The image processor cuts a resized image into patches of p x p pixels, normalises each channel, and repeats each patch for two
moments in time: `pixel_values` (n, 3 * 2 * p * p). Here an image is its patches (n, 3, p, p) in 0-1, once.

Letters: n patches of an image, p side of a patch in pixels, m side of the square of patches that becomes one token.
"""

from dataclasses import replace

import torch
from PIL import Image

from models.qwen.policy import PromptBatch


class QwenPixels:
    """For the patches that `image_processor` makes."""

    def __init__(self, image_processor):
        self.patch, self.times, self.merge = (
            getattr(image_processor, f"{name}_size") for name in ("patch", "temporal_patch", "merge")
        )
        self.mean, self.std = (torch.tensor(getattr(image_processor, f"image_{name}"))[:, None, None] for name in ("mean", "std"))

    def of(self, batch: PromptBatch) -> list[torch.Tensor]:
        """The images of a batch, each (n, 3, p, p) in 0-1."""
        return [self._unpack(values)[:, :, 0] * self.std.to(values) + self.mean.to(values) for values in batch.pixel_values]

    def put(self, batch: PromptBatch, pixels: list[torch.Tensor]) -> PromptBatch:
        """The same prompts about these images instead; nothing kept about the former ones applies to them."""
        values = [self._pack((x - self.mean.to(x)) / self.std.to(x)) for x in pixels]
        return replace(batch, pixel_values=values, image_keys=[None] * len(values))

    def picture(self, pixels: torch.Tensor, grid: torch.Tensor) -> Image.Image:
        """One image as a file would keep it; `grid` is its row of `image_grid_thw`."""
        _, rows, columns = grid.tolist()
        m = self.merge
        squares = pixels.unflatten(0, (rows // m, columns // m, m, m))  # then 3, p, p
        whole = squares.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * self.patch, columns * self.patch, 3)
        return Image.fromarray((whole * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy())

    def _unpack(self, values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(1, (3, self.times, self.patch, self.patch))

    def _pack(self, patches: torch.Tensor) -> torch.Tensor:
        return patches[:, :, None].expand(-1, -1, self.times, -1, -1).flatten(1)
