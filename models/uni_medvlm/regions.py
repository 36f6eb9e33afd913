"""A region of an image as one vector for the language model: the mean of what the vision tower sees there (MedPLIB, section 3.2).

A region is a mask. Each patch counts by the share of it that the mask covers. With `compat="reference"` it is MedPLIB's mean over
points instead, one for each patch whose first pixel the mask covers: its points lie up to a patch too far up and left, and of a
region that covers no such pixel the vector is zero. Of more than 512 points the published code takes some at random, here all
count.

Letters: g patches of a side, N = g * g.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.uni_medvlm.encoder.tiling import Box


def patch_weights(mask: Image.Image, box: Box, size: int, grid: int, compat: str = "default") -> Tensor:
    """What each patch counts in the mean over a region, [N] float32 with the sum 1.

    mask: L, of the image's size, positive inside; the image lies in `box` of a square of `size` pixels, of `grid` x `grid` patches.
    ValueError for a mask that covers nothing.
    """
    left, top, right, bottom = box
    inside = Image.fromarray((np.asarray(mask.convert("L")) > 0).astype(np.float32))
    resized = np.asarray(inside.resize((right - left, bottom - top), Image.Resampling.BOX))
    square = torch.zeros(1, 1, size, size)
    square[0, 0, top:bottom, left:right] = torch.from_numpy(resized.copy())
    shares = F.adaptive_avg_pool2d(square, grid).flatten()
    if not shares.any():
        raise ValueError("a region that covers nothing of its image")
    if compat == "reference":
        return sampled_weights(F.interpolate(square, (grid, grid), mode="nearest")[0, 0] > 0.5)
    return shares / shares.sum()


def sampled_weights(points: Tensor) -> Tensor:
    """What each patch counts in MedPLIB's mean over points, [N] float32: the sum is 1, or 0 where there are no points.

    points [g, g] bool: point (i, j) is read, between patches, at (i, j) / g of the way from the first patch to the last.
    """
    side = len(points)
    place = torch.arange(side) / side * (side - 1)
    near = (1 - (place[:, None] - torch.arange(side)).abs()).clamp(min=0)  # [point, patch]: bilinear along one side
    weights = near.T @ points.float() @ near
    return weights.flatten() / points.sum().clamp(min=1)
