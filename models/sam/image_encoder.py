"""SAM's image encoder: a plain ViT with windowed and a few global blocks (arXiv 2304.02643, 2203.16527), and with the
adapters of SAM-Med2D (arXiv 2308.16184).

    [B, 3, S, S] -> patches of 16 -> `depth` blocks on [B, H, W, C], H = W = S / 16 -> neck -> [B, 256, H, W]

Decomposed relative positions add q.Rh[y_q - y_k] + q.Rw[x_q - x_k] to each score. Both are products of the query with
something that depends on the key's row or column only, so they are written as H + W further channels of q against one-hot
channels of k: no [heads, N, N] bias exists. Shape letters: B batch, H W height and width of the map or window, C channels,
N = H W tokens, d head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sam.layers import merge_windows, neck, partition_windows


class Attention(nn.Module):
    """Multi-head self-attention over a `size` x `size` map or window, [B, N, C] -> same."""

    def __init__(self, channels: int, num_heads: int, size: int):
        super().__init__()
        self.num_heads, self.size = num_heads, size
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, channels // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, channels // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        q, k = self._with_positions(q, k)
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))  # flash kernels want one head size
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., : x.shape[-1] // self.num_heads]
        return self.proj(y.transpose(1, 2).flatten(2))

    def _with_positions(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k with 2 `size` further channels whose products are the relative positions' scores."""
        size = self.size
        index = torch.arange(size, device=q.device)
        offset = index[:, None] - index[None, :] + size - 1
        grid = q.unflatten(2, (size, size))
        rows = torch.einsum("bnyxd,ykd->bnyxk", grid, self.rel_pos_h[offset]).flatten(2, 3)
        columns = torch.einsum("bnyxd,xkd->bnyxk", grid, self.rel_pos_w[offset]).flatten(2, 3)
        one_hot = torch.eye(size, dtype=k.dtype, device=k.device)
        of_key = torch.cat([one_hot.repeat_interleave(size, 0), one_hot.repeat(size, 1)], dim=-1)
        q = torch.cat([q * q.shape[-1] ** -0.5, rows, columns], dim=-1)
        return q, torch.cat([k, of_key.expand(*k.shape[:2], -1, -1)], dim=-1)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.lin1 = nn.Linear(channels, 4 * channels)
        self.lin2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Adapter(nn.Module):
    """SAM-Med2D's adapter on [B, H, W, C], H and W even: a channel gate, a spatial bottleneck, a LayerNorm."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.channel = nn.Sequential(
            nn.Linear(channels, channels // 4, bias=False),
            nn.ReLU(),
            nn.Linear(channels // 4, channels, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gated = x * self.channel(x.mean((1, 2)))[:, None, None]
        return self.norm(x + self.spatial(gated.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Attention (in windows, or global where `window` is 0) and a feed-forward layer on [B, H, W, C], H = W = `size`."""

    def __init__(self, channels: int, num_heads: int, window: int, size: int, adapter: bool):
        super().__init__()
        self.window = window or size
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, num_heads, self.window)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = FeedForward(channels)
        self.Adapter = Adapter(channels) if adapter else None

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        windows = partition_windows(self.norm1(x), self.window)
        x = x + merge_windows(self.attn(windows), self.window, H, W)
        y = self.norm2(x)
        return x + self.mlp(y) if self.Adapter is None else x + self.mlp(y) + self.Adapter(y)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, channels, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


class ImageEncoder(nn.Module):
    """ViT-B/L/H for images of `image_size` pixels; `global_blocks` are those without windows."""

    def __init__(
        self,
        channels: int,
        depth: int,
        num_heads: int,
        global_blocks: tuple[int, ...],
        image_size: int = 1024,
        adapters: bool = False,
    ):
        super().__init__()
        size = image_size // 16
        self.patch_embed = PatchEmbed(channels, 16)
        self.pos_embed = nn.Parameter(torch.zeros(1, size, size, channels))
        self.blocks = nn.ModuleList(
            Block(channels, num_heads, 0 if i in global_blocks else 14, size, adapters) for i in range(depth)
        )
        self.neck = neck(channels)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] normalised pixels -> [B, 256, S / 16, S / 16]."""
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))
