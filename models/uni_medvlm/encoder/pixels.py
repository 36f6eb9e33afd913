"""An image as the hybrid encoder's two towers read it: CLIP's and ImageNet's normalisation, in one piece or in tiles.

In one piece the image is resized to both squares, whatever its aspect, as Uni-MedVLM publishes it. In tiles
(`models.uni_medvlm.encoder.tiling`) it keeps its aspect, and what it leaves empty is zero after normalisation: the mean colour.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.uni_medvlm.encoder.tiling import Box, Layout, windows

VIT_SIZE, CONVNEXT_SIZE = 336, 768  # pixels of a tile
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean and std of each channel in 0-1
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class HybridPixels(NamedTuple):
    """One image. `images_vit` [V, 3, v, v], its V views; `images_convnext` [3, rows * c, columns * c], its canvas."""

    images_vit: Tensor
    images_convnext: Tensor


def hybrid_pixels(
    image: Image.Image, *, tiling: bool = False, vit_size: int = VIT_SIZE, convnext_size: int = CONVNEXT_SIZE
) -> HybridPixels:
    """The image of any size and mode; with `tiling` V is 3 to 5, else 1."""
    image = image.convert("RGB")
    if not tiling:
        whole = (0, 0, vit_size, vit_size)
        vit = placed(image, whole, (vit_size, vit_size), CLIP)[None]
        return HybridPixels(vit, placed(image, (0, 0, convnext_size, convnext_size), (convnext_size, convnext_size), IMAGENET))
    layout = Layout.fit(image.size)
    columns, rows = layout.columns, layout.rows
    view = placed(image, layout.global_box(vit_size), (vit_size, vit_size), CLIP)
    canvas = placed(image, layout.box(vit_size), (columns * vit_size, rows * vit_size), CLIP)
    convnext = placed(image, layout.box(convnext_size), (columns * convnext_size, rows * convnext_size), IMAGENET)
    return HybridPixels(torch.cat([view[None], windows(canvas, columns, rows)]), convnext)


def placed(image: Image.Image, box: Box, size: tuple[int, int], normalisation: tuple[tuple[float, ...], ...]) -> Tensor:
    """The RGB image, resized (bicubic) into `box` of a canvas of `size` (width, height), normalised: [3, height, width]."""
    left, top, right, bottom = box
    resized = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = (np.array(channels, dtype=np.float32) for channels in normalisation)
    canvas = torch.zeros(3, size[1], size[0])
    canvas[:, top:bottom, left:right] = torch.from_numpy((resized - mean) / std).permute(2, 0, 1)
    return canvas
