"""A region of an image as one vector for the language model: the mean of what the vision tower sees there (MedPLIB, section 3.2).

A region is a mask. Each patch counts by the share of it that the mask covers. `compat="reference"` samples points instead, as
MedPLIB's code does: its grid lies up to half a patch too far up and left.

Letters: g patches of a side, N = g * g, D width of the vision tower.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.uni_medvlm.encoder.tiling import Box

MOST_POINTS = 512


def patch_weights(mask: Image.Image, box: Box, size: int, grid: int) -> Tensor:
    """The share of each patch that a mask covers, [N] float32 with the sum 1.

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
    return shares / shares.sum()


def sampled_feature(features: Tensor, mask: Tensor) -> Tensor:
    """As MedPLIB computes it: features [N, D], mask [g, g] bool with at most `MOST_POINTS` points -> [D], zeros for none.

    Raises ValueError for more points, of which the published code takes some at random.
    """
    rows, columns = torch.where(mask)
    if len(rows) > MOST_POINTS:
        raise ValueError(f"{len(rows)} points: expected at most {MOST_POINTS}")
    if not len(rows):
        return features.new_zeros(features.shape[1])
    side = mask.shape[0]
    points = torch.stack([columns, rows], -1).to(features.dtype) / side
    grid = features.T.reshape(1, -1, side, side)
    return F.grid_sample(grid, 2 * points[None, None] - 1, mode="bilinear", align_corners=True)[0, :, 0].mean(-1)
