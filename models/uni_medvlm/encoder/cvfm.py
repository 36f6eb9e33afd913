"""CVFM, the ConvNeXt-ViT deep fusion module of FILA (arXiv:2412.08378): tokens of a ViT take in a map of a ConvNeXt.

    x' = x + tanh(g) MLP([x, m]),    MLP = Linear -> GELU -> Linear

where m is the map, resized to the patches' grid. The class token stays as it is. The last Linear begins as zero, so x' is exactly
x. The first step's gradient reaches the last Linear, and opens the way to g and to the first.

With `compat="reference"`, as Uni-MedVLM publishes it, x' = LayerNorm(x + tanh(g) MLP([x, m])), also for the class token, whose m is
the mean over the patches', and g starts at zero. The LayerNorm rescales the ViT's states even where g is zero.

Letters: B images, N patches, D width of the ViT, C channels of the map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4  # hidden units of the MLP to each of the ViT's
OPEN = 1.0  # the gate's first value, where the last Linear is what closes it


class CVFM(nn.Module):
    """Fuses maps of `conv_dim` channels into tokens of width `vit_dim`; the keys are the published ones."""

    def __init__(self, vit_dim: int, conv_dim: int, compat: str = "default"):
        super().__init__()
        if compat not in ("default", "reference"):
            raise ValueError(f"compat must be 'default' or 'reference', not {compat!r}")
        hidden = EXPANSION * vit_dim
        last = nn.Linear(hidden, vit_dim)
        self.mlp = nn.Sequential(nn.Linear(vit_dim + conv_dim, hidden), nn.GELU(), last)
        self.published = compat == "reference"
        self.gate = nn.Parameter(torch.full((1,), 0.0 if self.published else OPEN))
        if self.published:
            self.norm = nn.LayerNorm(vit_dim)
        else:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, feature_map: Tensor) -> Tensor:
        """tokens [B, 1 + N, D] with the class token first, feature_map [B, C, h, w] of any h and w -> [B, 1 + N, D].

        The N patches are a square grid. Resizing is bilinear and without antialiasing, as published.
        """
        grid = int((tokens.shape[1] - 1) ** 0.5)
        aligned = F.interpolate(feature_map, (grid, grid), mode="bilinear", align_corners=False)
        aligned = aligned.flatten(2).transpose(1, 2)  # [B, N, C]
        if self.published:
            aligned = torch.cat([aligned.mean(1, keepdim=True), aligned], 1)
            return self.norm(tokens + self._update(tokens, aligned))
        patches = tokens[:, 1:]
        return torch.cat([tokens[:, :1], patches + self._update(patches, aligned)], 1)

    def _update(self, tokens: Tensor, aligned: Tensor) -> Tensor:
        return torch.tanh(self.gate) * self.mlp(torch.cat([tokens, aligned], -1))
