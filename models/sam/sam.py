"""Segment Anything and its medical and small descendants: an image encoder, a prompt encoder and a mask decoder.

| builder | image encoder | input | published checkpoint | paper |
|---|---|---|---|---|
| tiny_sam | TinyViT-5M | 1024, longest side, ImageNet statistics | tinysam_42.3.pth | arXiv 2312.13789 |
| lite_medsam | TinyViT-5M, stem of stride 1 | 256, longest side, minimum to maximum as 0-1 | lite_medsam.pth | arXiv 2304.12306 |
| sam_med2d | ViT-B with adapters | 256, both sides stretched (nearest), ImageNet statistics | sam-med2d_b.pth | arXiv 2308.16184 |
| sam_vit_b, _l, _h | ViT-B, L, H | 1024, longest side, ImageNet statistics | sam_vit_*.pth | arXiv 2304.02643 |

Shape letters: B images, P prompts of an image, M masks of a prompt, S input size, C embedding channels, h w embedding size.
"""

import torch
from torch import Tensor, nn

from models.sam.image_encoder import ImageEncoder
from models.sam.mask_decoder import MaskDecoder
from models.sam.prompt_encoder import PromptEncoder
from models.sam.tiny_vit import TinyViT
from models.sam.two_way_transformer import TwoWayTransformer

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, for pixels in 0-255


class Sam(nn.Module):
    """`normalisation` is "imagenet" or "min_max", `fit` how an image meets the square input: see models.sam.frame."""

    def __init__(self, image_encoder: nn.Module, image_size: int, embedding_size: int, normalisation: str, fit: str):
        super().__init__()
        self.image_size, self.normalisation, self.fit = image_size, normalisation, fit
        self.image_encoder = image_encoder
        self.prompt_encoder = PromptEncoder((embedding_size, embedding_size), image_size)
        self.mask_decoder = MaskDecoder(TwoWayTransformer())

    def forward(self, images: Tensor, *, multimask_output: bool, **prompts: Tensor) -> tuple[Tensor, Tensor]:
        """low_res_masks [B, P, M, 4h, 4w] logits, iou_predictions [B, P, M] of normalised images [B, 3, S, S].

        `prompts` are those of `PromptEncoder.forward`, in pixels of the S x S input.
        """
        return self.decode(self.image_encoder(images), multimask_output=multimask_output, **prompts)

    def decode(self, image_embeddings: Tensor, *, multimask_output: bool, **prompts: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, from image embeddings [B, C, h, w]."""
        sparse, dense = self.prompt_encoder(**prompts)
        return self.mask_decoder(image_embeddings, self.prompt_encoder.dense_pe(), sparse, dense, multimask_output)

    def normalise(self, pixels: Tensor) -> Tensor:
        """[3, H, W] pixels (0-255 for "imagenet", any scale for "min_max") as the encoder expects them."""
        return normalised(pixels, self.normalisation)


def normalised(pixels: Tensor, how: str) -> Tensor:
    """`Sam.normalise` without the networks, which a data loader's workers do not have."""
    if how == "min_max":
        low, high = pixels.aminmax()
        return (pixels - low) / (high - low).clamp(min=1e-8)
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


def tiny_sam() -> Sam:
    return Sam(TinyViT(stem=(3, 2), classifier=True), 1024, 64, "imagenet", "corner")


def lite_medsam() -> Sam:
    return Sam(TinyViT(stem=(1, 1), classifier=False), 256, 64, "min_max", "corner")


def sam_med2d() -> Sam:
    encoder = ImageEncoder(768, 12, 12, global_blocks=(2, 5, 8, 11), image_size=256, adapters=True)
    return Sam(encoder, 256, 16, "imagenet", "stretch_nearest")


def sam_vit_b() -> Sam:
    return Sam(ImageEncoder(768, 12, 12, global_blocks=(2, 5, 8, 11)), 1024, 64, "imagenet", "corner")


def sam_vit_l() -> Sam:
    return Sam(ImageEncoder(1024, 24, 16, global_blocks=(5, 11, 17, 23)), 1024, 64, "imagenet", "corner")


def sam_vit_h() -> Sam:
    return Sam(ImageEncoder(1280, 32, 16, global_blocks=(7, 15, 23, 31)), 1024, 64, "imagenet", "corner")


BUILDERS = {build.__name__: build for build in (tiny_sam, lite_medsam, sam_med2d, sam_vit_b, sam_vit_l, sam_vit_h)}
