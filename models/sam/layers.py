"""Layers that several parts of the SAM family share. Shape letters: B batch, C channels, H W height and width."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLP(nn.Module):
    """Linear layers with ReLU between them: [..., in_dim] -> [..., out_dim]."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        sizes = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def neck(in_channels: int, channels: int = 256) -> nn.Sequential:
    """The 1x1 and 3x3 convolutions that end every SAM image encoder: [B, in_channels, H, W] -> [B, channels, H, W]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


def in_bands(function: Callable[[Tensor], Tensor], x: Tensor, dim: int, halo: int = 0, rows: int = 16) -> Tensor:
    """`function(x)`, where row i of the result depends on rows i - halo to i + halo of x only (rows along dimension `dim`).

    On a CPU it is computed in bands of rows, so that its intermediate tensors stay in the cache and cause no page faults
    (TinyViT's first MBConv at 256 x 256: 190 ms whole, 80 ms in bands, one thread of a Xeon). Elsewhere, and in graphs that are
    exported, whose compilers choose for themselves, whole.
    """
    height = x.shape[dim]
    if x.device.type != "cpu" or height <= rows or torch.compiler.is_exporting():
        return function(x)
    bands = []
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        low, high = max(top - halo, 0), min(bottom + halo, height)
        band = function(x.narrow(dim, low, high - low))
        bands.append(band.narrow(dim, top - low, bottom - top))
    return torch.cat(bands, dim)


def partition_windows(x: Tensor, window: int) -> Tensor:
    """[B, H, W, C], zero padded at the bottom and right, -> [B * windows, window * window, C]."""
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % window, 0, -H % window))
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))
    return x.transpose(2, 3).reshape(-1, window * window, C)


def merge_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `partition_windows`: the padding is cut off again, -> [B, height, width, C]."""
    rows, columns = -(-height // window), -(-width // window)
    x = x.view(-1, rows, columns, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, rows * window, columns * window, x.shape[-1])[:, :height, :width]
