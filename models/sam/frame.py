"""How an image of any size lies in a model's square input, and the way back for coordinates and masks."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """The image of `original` (height, width) fills `resized` (height, width) of a `size` x `size` square, `top` and
    `left` pixels from its edges; the rest is zero. `nearest`: pixels are picked, not interpolated."""

    original: tuple[int, int]
    resized: tuple[int, int]
    size: int
    top: int = 0
    left: int = 0
    nearest: bool = False

    @classmethod
    def fit(cls, original: tuple[int, int], size: int, how: str) -> "Frame":
        """`how`: "corner" scales the longest side to `size` and puts the image at the top left, "centre" in the middle,
        "stretch" scales both sides to `size`, "stretch_nearest" too, picking pixels (as SAM-Med2D was trained)."""
        if how.startswith("stretch"):
            return cls(original, (size, size), size, nearest=how == "stretch_nearest")
        height, width = (max(1, int(side * size / max(original) + 0.5)) for side in original)
        if how == "corner":
            return cls(original, (height, width), size)
        return cls(original, (height, width), size, (size - height) // 2, (size - width) // 2)

    def resize(self, pixels: np.ndarray) -> Tensor:
        """[H, W, 3] pixels -> [3, h, w] float; uint8 stays on whole numbers, as the models were trained."""
        bands = (Image.fromarray(pixels),) if pixels.dtype == np.uint8 else map(Image.fromarray, np.moveaxis(pixels, -1, 0))
        (height, width), how = self.resized, Image.Resampling.NEAREST if self.nearest else Image.Resampling.BILINEAR
        resized = [np.array(band.resize((width, height), how), dtype=np.float32) for band in bands]
        return torch.from_numpy(resized[0].transpose(2, 0, 1) if len(resized) == 1 else np.stack(resized))

    def pad(self, image: Tensor) -> Tensor:
        """[3, h, w] -> [3, size, size]."""
        bottom, right = self.size - self.top - image.shape[-2], self.size - self.left - image.shape[-1]
        return F.pad(image, (self.left, right, self.top, bottom))

    def points(self, points: Tensor) -> Tensor:
        """[..., 2] as (x, y) in pixels of the original -> pixels of the square."""
        scale = points.new_tensor([self.resized[1] / self.original[1], self.resized[0] / self.original[0]])
        return points * scale + points.new_tensor([self.left, self.top])

    def masks(self, low_res_masks: Tensor) -> Tensor:
        """[N, M, 4h, 4w] logits over the square -> [N, M, H, W] logits over the original."""
        masks = low_res_masks
        if masks.shape[-1] != self.size:
            masks = F.interpolate(masks, (self.size, self.size), mode="bilinear", align_corners=False)
        masks = masks[..., self.top : self.top + self.resized[0], self.left : self.left + self.resized[1]]
        return F.interpolate(masks, self.original, mode="bilinear", align_corners=False)


def as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """[H, W, 3] pixels: uint8 of ordinary images, float32 of 16-bit and floating ones (their own scale, for "min_max")."""
    if isinstance(image, Image.Image) and image.mode not in ("F", "I", "I;16", "I;16B", "I;16L"):
        return np.asarray(image.convert("RGB"))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"an image must be [H, W] or [H, W, 3], not {pixels.shape}")
    return pixels
