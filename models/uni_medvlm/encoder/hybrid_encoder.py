"""FILA's hybrid encoder (arXiv:2412.08378) as Uni-MedVLM uses it: a CLIP ViT that takes in a ConvNeXt's maps while it reads.

    after ViT layer FUSED_AFTER[i]:   tokens = CVFM_i(tokens, map of ConvNeXt stage i)

Both towers are Hugging Face's and frozen; the CVFMs learn. The published code runs the ViT without gradients, so that its CVFMs
never learn; here gradients go through it, and nothing is recorded before the first fusion, where nothing needs it.

Letters: V views (images, or tiles of images), N patches of a view, D width of the ViT, C channels of a map.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel

from models.uni_medvlm.encoder.cvfm import CVFM
from models.uni_medvlm.encoder.tiling import squared, windows

FUSED_AFTER = (2, 6, 12, 20)  # layers of the ViT, counted from 1
STRIDE = 32  # pixels of a ConvNeXt to a side of the last stage's map


class HybridEncoder(nn.Module):
    """`select_layer` counts hidden states as CLIP does: -2 is the output of the last layer but one, which LLaVA reads.

    Raises ValueError where `fused_after` does not name one layer for each stage, in order and none past the selected one.
    """

    def __init__(
        self,
        vision_tower: CLIPVisionModel,
        convnext_encoder: ConvNextModel,
        *,
        fused_after: Sequence[int] = FUSED_AFTER,
        select_layer: int = -2,
        tiling: bool = False,
        compat: str = "default",
    ):
        super().__init__()
        vit: Any = vision_tower.config
        convnext: Any = convnext_encoder.config
        self.num_layers = vit.num_hidden_layers + 1 + select_layer  # those that run
        stages, last = len(convnext.hidden_sizes), self.num_layers
        in_order = list(fused_after) == sorted({*fused_after} & {*range(1, last + 1)})
        if len(fused_after) != stages or not in_order:
            raise ValueError(f"fused_after must name {stages} layers from 1 to {last} in order, not {tuple(fused_after)}")
        self.vision_tower = vision_tower.requires_grad_(False)
        self.convnext_encoder = convnext_encoder.requires_grad_(False)
        self.convnext_encoder.register_module("layernorm", nn.Identity())  # of its pooled output, which nothing reads
        self.cvfm_modules = nn.ModuleList(CVFM(vit.hidden_size, channels, compat) for channels in convnext.hidden_sizes)
        self.fused_after, self.tiling = tuple(fused_after), tiling
        self.convnext_size = vit.image_size // vit.patch_size * STRIDE  # 768: the last map is then the grid of the patches

    def forward(self, images_vit: Tensor, images_convnext: Tensor | Sequence[Tensor]) -> Tensor:
        """Features of the patches, [V, N, D], without the class token.

        images_vit [V, 3, 336, 336] with CLIP's normalisation; images_convnext [V, 3, 768, 768] with ImageNet's. With `tiling`,
        images_convnext is a canvas an image, [3, rows * 768, columns * 768], and images_vit the views of all images, one after the
        other: each image's global view, then its tiles row by row. Raises ValueError where they are not as many.
        """
        maps = self.view_maps([*images_convnext]) if self.tiling else self.stage_maps(torch.stack([*images_convnext]))
        if maps[0].shape[0] != images_vit.shape[0]:
            raise ValueError(f"images_vit has {images_vit.shape[0]} views, and images_convnext is of {maps[0].shape[0]}")

        tower = self.vision_tower
        tokens = tower.pre_layrnorm(tower.embeddings(images_vit))
        for number, layer in enumerate(tower.encoder.layers[: self.num_layers], 1):
            tokens = layer(tokens, None)
            if number in self.fused_after:
                stage = self.fused_after.index(number)
                tokens = self.cvfm_modules[stage](tokens, maps[stage])
        return tokens[:, 1:]

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """[B, 3, h, w] -> [B, C, h / s, w / s] of each stage, s = 4, 8, 16, 32."""
        x, maps = self.convnext_encoder.embeddings(images), []
        for stage in self.convnext_encoder.encoder.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def view_maps(self, canvases: Sequence[Tensor]) -> list[Tensor]:
        """Canvases [3, rows * 768, columns * 768] -> [V, C, s, s] of each stage: what each view of each canvas is fused with.

        A global view's map is brought to its tiles' size, as CVFM would: bilinear, without antialiasing.
        """
        views: list[list[Tensor]] = []
        for canvas in canvases:
            rows, columns = (side // self.convnext_size for side in canvas.shape[1:])
            if canvas.shape[1:] != (rows * self.convnext_size, columns * self.convnext_size) or not rows * columns:
                raise ValueError(f"a canvas must have sides of n x {self.convnext_size} pixels, not {tuple(canvas.shape[1:])}")
            views.append([_of_views(stage[0], columns, rows) for stage in self.stage_maps(canvas[None])])
        return [torch.cat(stage) for stage in zip(*views, strict=True)]


def _of_views(feature_map: Tensor, columns: int, rows: int) -> Tensor:
    tiles = windows(feature_map, columns, rows)
    whole = F.interpolate(squared(feature_map)[None], tiles.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([whole, tiles])


def vit_large(**changes: object) -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels, or a smaller one of its kind."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPVisionConfig(**{**sizes, "image_size": 336, "patch_size": 14, "projection_dim": 768, **changes})  # type: ignore[arg-type]


def convnext_large(**changes: object) -> ConvNextConfig:
    """ConvNeXt-L, or a smaller one of its kind."""
    return ConvNextConfig(**{"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], **changes})  # type: ignore[arg-type]
