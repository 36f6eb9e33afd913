"""Image tokens to mask logits: SAM's two transposed convolutions and the hyper-network's dot product, in one pass.

    u = GELU(LayerNorm(x W1 + b1))      a stride 2, kernel 2 transposed convolution does not overlap:
    m = hyper . GELU(u W2 + b2)         token -> 4 pixels x C1 -> 16 pixels x C2 -> 16 logits of each mask

G prompts, N = h w image tokens of C channels, C1 = C / 4, C2 = C / 8, M masks (only those that are asked for).
Per token 2 C 4 C1 + 4 . 2 C1 4 C2 + 16 . 2 C2 M FLOPs; x is read once and 16 M logits written. SAM's formulation also
writes and reads [4N, C1] and [16N, C2] five times over and computes all four masks.
"""

import torch.nn.functional as F
from torch import Tensor


def mask_upscale_reference(image, height, weight1, bias1, norm_weight, norm_bias, weight2, bias2, hyper, eps=1e-6):
    """Logits [G, M, 4h, 4w] of image [G, h w, C], weight1 [C, C1, 2, 2], weight2 [C1, C2, 2, 2], hyper [G, M, C2]."""
    G, N, C = image.shape
    (_, C1, *_), (_, C2, *_) = weight1.shape, weight2.shape
    u = image @ weight1.permute(0, 2, 3, 1).reshape(C, 4 * C1) + bias1.repeat(4)
    u = F.gelu(F.layer_norm(u.view(G, 4 * N, C1), (C1,), norm_weight, norm_bias, eps))
    u = F.gelu(u @ weight2.permute(0, 2, 3, 1).reshape(C1, 4 * C2) + bias2.repeat(4)).view(G, 16 * N, C2)
    logits = (u @ hyper.transpose(1, 2)).view(G, height, N // height, 2, 2, 2, 2, -1)  # y x, then y x of each step
    return logits.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(G, -1, 4 * height, 4 * N // height)


def mask_upscale(
    image: Tensor,
    height: int,
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    hyper: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Mask logits [G, M, 4h, 4w] of image tokens [G, h w, C]; `hyper` [G, M, C2] holds the masks that are wanted."""
    return mask_upscale_reference(image, height, weight1, bias1, norm_weight, norm_bias, weight2, bias2, hyper, eps)
