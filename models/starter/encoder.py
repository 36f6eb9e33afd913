"""An image encoder in TinyViT's manner, small enough to be trained from nothing on a laptop: 0.13 M parameters at 128 pixels."""

import torch
from torch import Tensor, nn

from models.sam.layers import neck
from models.sam.sam import Sam
from models.sam.tiny_vit import AttentionStage, ConvStage, PatchEmbed


class StarterEncoder(nn.Module):
    """[B, 3, S, S] pixels -> [B, channels, S / 8, S / 8]: a stem of stride 4, an MBConv and an attention block in windows."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(32, kernel=3, stride=2)
        self.layers = nn.ModuleList([ConvStage(32, 64, depth=1), AttentionStage(64, num_heads=2, window=8, depth=2, merge=None)])
        self.neck = neck(64, channels)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images.contiguous(memory_format=torch.channels_last))
        for stage in self.layers:
            x = stage(x)
        return self.neck(x.permute(0, 3, 1, 2))


def starter_sam() -> Sam:
    """A SAM of SAM-Med2D's kind with this encoder at 64 pixels; the mask decoder has its real size."""
    return Sam(StarterEncoder(256), 64, 8, "imagenet", "centre")
