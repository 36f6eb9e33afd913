"""What a network reads of an image, made on any device, with Pillow's resizing: by Pillow on a CPU, by its weights elsewhere.

    uint8 -> [middle of a square] -> resized -> normalised -> [square of zeros | patches]         in float32

Pillow resizes columns and then rows, or rows first where that is less work, with weights of 22 bits and 8 bits between. PyTorch's
resizing is within 1 level of 256 of it, now and then 2; DALI's is up to 14 off: it repeats an image's border.

Letters: H, W rows and columns of an image, n patches, p side of a patch, m side of a square of patches, t moments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ONE = 1 << 22  # what a weight of 1 is in Pillow
Colour = Sequence[float]  # of three channels


class View(Protocol):
    """As `models.views.View` says it."""

    @property
    def resized(self) -> Callable[[int, int], tuple[int, int]]: ...
    @property
    def mean(self) -> Colour: ...
    @property
    def std(self) -> Colour: ...
    @property
    def bicubic(self) -> bool: ...
    @property
    def fill(self) -> Sequence[int] | None: ...
    @property
    def side(self) -> int | None: ...
    @property
    def patch(self) -> tuple[int, int, int] | None: ...


def make_view(pixels: Tensor, view: View) -> Tensor:
    """pixels [H, W, 3] uint8 -> [3, h, w] float32, [3, side, side], or patches [n, 3 * t * p * p]."""
    height, width, _ = pixels.shape
    image = pixels.permute(2, 0, 1)
    if view.fill:
        image = _squared(image, view.fill)
    image = resize(image, view.resized(height, width), bicubic=view.bicubic)
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (view.mean, view.std))
    image = (image.float() / 255 - mean) / std
    if view.side:
        return _padded(image, view.side)
    if view.patch is None:
        return image
    p, m, t = view.patch
    rows, columns = (length // (p * m) for length in image.shape[1:])
    squares = image.view(3, rows, m, p, columns, m, p).permute(1, 4, 2, 5, 0, 3, 6)  # then t moments alike
    return squares[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, t, -1, -1).reshape(rows * columns * m * m, -1)


def mask_view(mask: Tensor, view: View) -> Tensor:
    """mask [H, W] uint8, which lies as the image of its size: by nearest, [1, h, w] or [1, side, side] uint8."""
    shown = mask[None]
    if view.fill:
        shown = _squared(shown, (0,))
    for axis, (length, size) in enumerate(zip(shown.shape[1:], view.resized(*mask.shape), strict=True), start=1):
        steps = np.full(size, length / size)
        steps[0] /= 2
        places = torch.from_numpy(np.cumsum(steps).astype(np.int64))  # one after the other, as Pillow rounds
        shown = shown.index_select(axis, places.to(mask.device))
    return _padded(shown, view.side) if view.side else shown


def resize(image: Tensor, size: tuple[int, int], *, bicubic: bool = True) -> Tensor:
    """[3, H, W] uint8 -> [3, *size] uint8, antialiased."""
    if image.device.type != "cpu":
        return resize_by_weights(image, size, bicubic=bicubic)
    picture, (rows, columns) = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), size
    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return torch.from_numpy(np.array(picture.resize((columns, rows), how))).permute(2, 0, 1)


def resize_by_weights(image: Tensor, size: tuple[int, int], *, bicubic: bool = True) -> Tensor:
    """The same [C, H, W] -> [C, *size] as products with Pillow's weights, which are exact in float64."""
    (height, width), (rows, columns) = image.shape[1:], size
    rows_first = rows < height and columns >= width
    for side in ("rows", "columns") if rows_first else ("columns", "rows"):
        if side == "rows" and rows != height:
            image = _rounded(pillow_weights(height, rows, bicubic).to(image.device) @ image.double())
        if side == "columns" and columns != width:
            image = _rounded(image.double() @ pillow_weights(width, columns, bicubic).to(image.device).T)
    return image


@functools.lru_cache(maxsize=256)
def pillow_weights(length: int, size: int, bicubic: bool) -> Tensor:
    """[size, length] float64, whole numbers: 2^22 times the weight of each of `length` pixels in each of `size`."""
    scale = length / size
    stretch = max(1.0, scale)
    centre = (np.arange(size) + 0.5) * scale
    reach = (2.0 if bicubic else 1.0) * stretch
    first = np.maximum(centre - reach + 0.5, 0).astype(int)
    last = np.minimum((centre + reach + 0.5).astype(int), length)
    pixel = np.arange(length)
    x = np.abs((pixel - centre[:, None] + 0.5) / stretch)
    if bicubic:  # Keys' kernel, a = -0.5
        weight = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
    else:
        weight = np.maximum(1 - x, 0)
    weight *= (pixel >= first[:, None]) & (pixel < last[:, None])
    weight /= weight.sum(1, keepdims=True)
    return torch.from_numpy(np.trunc(weight * ONE + np.copysign(0.5, weight)))


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + ONE / 2) / ONE).floor().clamp(0, 255).to(torch.uint8)


def _squared(image: Tensor, fill: Sequence[int]) -> Tensor:
    channels, height, width = image.shape
    side = max(height, width)
    square = torch.tensor(fill, dtype=torch.uint8, device=image.device)[:, None, None].repeat(1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


def _padded(image: Tensor, side: int) -> Tensor:
    return F.pad(image, (0, side - image.shape[2], 0, side - image.shape[1]))
