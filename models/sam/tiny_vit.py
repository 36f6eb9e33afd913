"""TinyViT-5M, the image encoder of TinySAM, MobileSAM and LiteMedSAM (arXiv 2207.10666, 2312.13789).

    [B, 3, S, S] -> patch embedding [B, 64, 4h, 4w] -> MBConv stage, 128 at 2h -> attention stages: 160 at h, 320, 320
    -> neck -> [B, 256, h, w],   h = w = 64 both for TinySAM (S = 1024, stem of stride 4) and LiteMedSAM (S = 256, stem of stride 1)

Facts that differ from other vision transformers: qkv is laid out per head as [q | k | v]; windows are padded with zeros
before the attention's LayerNorm and the padding is attended to; the attention bias depends on (|dy|, |dx|) only; the last
merge keeps the resolution. Shape letters: B batch, H W height and width, C channels, N tokens of a window.
"""

import itertools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sam.layers import in_bands, merge_windows, neck, partition_windows


class ConvBN(nn.Module):
    """Convolution and BatchNorm. In eval mode the norm is folded into the weights: one pass over the image, not two."""

    def __init__(self, in_channels: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.bn(self.c(x))
        mean, variance = cast(Tensor, self.bn.running_mean), cast(Tensor, self.bn.running_var)
        scale = self.bn.weight * (variance + self.bn.eps).rsqrt()
        weight, bias = self.c.weight * scale[:, None, None, None], self.bn.bias - mean * scale
        return F.conv2d(x, weight, bias, self.c.stride, self.c.padding, groups=self.c.groups)


class PatchEmbed(nn.Module):
    """Two convolutions, [B, 3, S, S] -> [B, C, S / stride^2, S / stride^2]."""

    def __init__(self, channels: int, kernel: int, stride: int):
        super().__init__()
        self.seq = nn.Sequential(
            ConvBN(3, channels // 2, kernel, stride), nn.GELU(), ConvBN(channels // 2, channels, kernel, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted bottleneck on [B, C, H, W]."""

    def __init__(self, channels: int, expand: int = 4):
        super().__init__()
        hidden = channels * expand
        self.conv1 = ConvBN(channels, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvBN(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self._whole(x) if self.training else in_bands(self._whole, x, dim=2, halo=1)

    def _whole(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(self.conv3(y) + x)


class PatchMerging(nn.Module):
    """[B, C, H, W] -> [B, out_channels, H / stride, W / stride]."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = ConvBN(channels, out_channels)
        self.conv2 = ConvBN(out_channels, out_channels, 3, stride, groups=out_channels)
        self.conv3 = ConvBN(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """LayerNorm and self-attention inside windows, [B * windows, N, C] -> same, with a learned bias by offset."""

    attention_bias_idxs: Tensor

    def __init__(self, channels: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        self.register_buffer("attention_bias_idxs", _offset_index(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, 3, -1)).transpose(1, 2).unbind(3)  # [.., heads, N, d]
        bias = self.attention_biases[None, :, self.attention_bias_idxs]  # four dimensions: flash attention on CPUs wants them
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


def _offset_index(window: int) -> Tensor:
    """[N, N]: which column of `attention_biases` a pair of tokens uses; offsets (|dy|, |dx|) are numbered as first met."""
    cells = list(itertools.product(range(window), repeat=2))
    seen: dict[tuple[int, int], int] = {}
    index = [seen.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(seen)) for a in cells for b in cells]
    return torch.tensor(index).view(len(cells), len(cells))


class FeedForward(nn.Module):
    """LayerNorm, Linear x 4, GELU, Linear."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Windowed attention, a depthwise convolution and a feed-forward layer on [B, H, W, C]."""

    def __init__(self, channels: int, num_heads: int, window: int):
        super().__init__()
        self.window = window
        self.attn = WindowAttention(channels, num_heads, window)
        self.local_conv = ConvBN(channels, channels, 3, groups=channels)
        self.mlp = FeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + in_bands(self._attend, x, dim=1, rows=self.window * max(1, 14 // self.window))  # no window is cut
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + in_bands(self.mlp, x, dim=1)

    def _attend(self, x: Tensor) -> Tensor:
        return merge_windows(self.attn(partition_windows(x, self.window)), self.window, *x.shape[1:3])


class ConvStage(nn.Module):
    """MBConv blocks, then the merge: [B, C, H, W] -> [B, H / 2, W / 2, out_channels]."""

    def __init__(self, channels: int, out_channels: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(MBConv(channels) for _ in range(depth))
        self.downsample = PatchMerging(channels, out_channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x).permute(0, 2, 3, 1)


class AttentionStage(nn.Module):
    """Attention blocks and, but in the last stage, a merge: [B, H, W, C] -> [B, H / stride, W / stride, out_channels]."""

    def __init__(self, channels: int, num_heads: int, window: int, depth: int, merge: tuple[int, int] | None):
        super().__init__()
        self.blocks = nn.ModuleList(TinyViTBlock(channels, num_heads, window) for _ in range(depth))
        self.downsample = PatchMerging(channels, *merge) if merge else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TinyViT(nn.Module):
    """The encoder. `stem` is (kernel, stride) of the two stem convolutions; `classifier` keeps the unused ImageNet head
    whose tensors TinySAM's checkpoint carries."""

    def __init__(self, stem: tuple[int, int], classifier: bool):
        super().__init__()
        self.patch_embed = PatchEmbed(64, *stem)
        self.layers = nn.ModuleList(
            [
                ConvStage(64, 128, depth=2),
                AttentionStage(128, num_heads=4, window=7, depth=2, merge=(160, 2)),
                AttentionStage(160, num_heads=5, window=14, depth=6, merge=(320, 1)),
                AttentionStage(320, num_heads=10, window=7, depth=2, merge=None),
            ]
        )
        if classifier:
            self.norm_head = nn.LayerNorm(320)
            self.head = nn.Linear(320, 1000)
        self.neck = neck(320)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] normalised pixels -> [B, 256, h, w]."""
        x = self.patch_embed(images.contiguous(memory_format=torch.channels_last))
        for stage in self.layers:
            x = stage(x)
        return self.neck(x.permute(0, 3, 1, 2))
