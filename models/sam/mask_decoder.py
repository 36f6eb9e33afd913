"""SAM's mask decoder (arXiv 2304.02643, appendix A): prompts and an image embedding to masks and their predicted IoU.

Shape letters: B images, P prompts of an image, T sparse tokens, C channels (256), h w image embedding, M masks (1 or 3).
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.mask_upscale import mask_upscale
from models.sam.layers import MLP, LayerNorm2d

NUM_MASK_TOKENS = 4  # one for prompts that are clear, three for ambiguous ones


class MaskDecoder(nn.Module):
    def __init__(self, transformer: nn.Module, channels: int = 256):
        super().__init__()
        self.transformer = transformer
        self.iou_token = nn.Embedding(1, channels)
        self.mask_tokens = nn.Embedding(NUM_MASK_TOKENS, channels)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(channels, channels // 4, 2, stride=2),
            LayerNorm2d(channels // 4),
            nn.GELU(),
            nn.ConvTranspose2d(channels // 4, channels // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(channels, channels, channels // 8, 3) for _ in range(NUM_MASK_TOKENS))
        self.iou_prediction_head = MLP(channels, channels, NUM_MASK_TOKENS, 3)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """low_res_masks [B, P, M, 4h, 4w] logits and iou_predictions [B, P, M].

        image_embeddings [B, C, h, w], image_pe [C, h, w], sparse [B, P, T, C], dense [B, P, C, h, w], or [1, 1, C, h, w]
        where it is the same for all prompts: then the first block works on one set of image tokens an image.
        """
        B, P = sparse_prompt_embeddings.shape[:2]
        height = image_embeddings.shape[-2]

        # Tokens of the outputs before those of the prompts.
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([outputs.expand(B, P, -1, -1), sparse_prompt_embeddings], dim=2).flatten(0, 1)

        image = (image_embeddings[:, None] + dense_prompt_embeddings).flatten(0, 1).flatten(2).transpose(1, 2).contiguous()
        tokens, image = self.transformer(tokens, image, image_pe.flatten(1).t().contiguous())

        # Only the masks that are wanted are computed.
        wanted = range(1, NUM_MASK_TOKENS) if multimask_output else range(1)
        hyper = torch.stack([self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in wanted], dim=1)
        layers: Any = self.output_upscaling  # whose modules have weights, which their type does not say
        first, norm, _, second, _ = layers
        masks = mask_upscale(
            image, height, first.weight, first.bias, norm.weight, norm.bias, second.weight, second.bias, hyper, norm.eps
        )
        iou = self.iou_prediction_head(tokens[:, 0])[:, wanted.start : wanted.stop]
        return masks.unflatten(0, (B, P)), iou.unflatten(0, (B, P))
