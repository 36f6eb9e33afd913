"""The cross attentions of mask_attention.py where no Triton runs: their forward on a CPU, and the backward of image_to_token.

Shape letters and equations are those of mask_attention.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_TOKENS = 512  # image tokens of a band on a CPU: half a megabyte


def token_to_image_eager(queries: Tensor, image: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
    """y and the log-sum-exp of each row's scores."""
    scores = (queries @ (image + image_pe).transpose(1, 2)).to(torch.promote_types(image.dtype, torch.float32))
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    return ((weights.to(image.dtype) @ image) / total).to(image.dtype), (top + total.log())[..., 0]


def image_to_token_in_bands(
    image: Tensor,
    image_pe: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """On a CPU: a band of tokens of one prompt at a time stays in the cache (4096 tokens: 4 ms instead of 12)."""
    (G, R, C), (X, N, _) = keys.shape, image.shape
    z = image.new_empty(G, N, C)
    for first in range(0, N, CPU_TOKENS):
        band = slice(first, first + CPU_TOKENS)
        for g in range(G):
            x = image[g * X // G, band]
            scores = torch.addmm(key_bias[g, :, None], keys[g], (x + image_pe[band]).t())  # heads and tokens outside: vectors
            weights = scores.view(num_heads, R // num_heads, len(x)).softmax(1).view(R, len(x))
            z[g, band] = F.layer_norm(torch.addmm(x, weights.t(), values[g]), (C,), norm_weight, norm_bias, eps)
    return z


def image_to_token_backward_eager(
    grad_z: Tensor,
    image: Tensor,
    image_pe: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    norm_weight: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh [G, N, C], w and ds [G, N, R], dx [X, N, C], and the gradients of the norm's weight and bias."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    x = image.repeat_interleave(len(keys) // len(image), 0)
    scores, by_head = (x + image_pe) @ keys.transpose(1, 2) + key_bias[:, None], (num_heads, keys.shape[1] // num_heads)
    weights = scores.unflatten(2, by_head).softmax(-1).flatten(2)
    h = (x + weights @ values).to(dtype)
    centred = h - h.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal, dz = centred * rstd, grad_z.to(dtype)
    grad_norm = torch.stack([(dz * normal).sum((0, 1)), dz.sum((0, 1))])
    dz = dz * norm_weight
    dh = (rstd * (dz - dz.mean(-1, keepdim=True) - normal * (dz * normal).mean(-1, keepdim=True))).to(image.dtype)
    product = (weights * (dh @ values.transpose(1, 2))).unflatten(2, by_head)
    ds = (product - weights.unflatten(2, by_head) * product.sum(-1, keepdim=True)).flatten(2)
    dx = (dh + ds @ keys).unflatten(0, (len(image), -1)).sum(1)
    return dh, weights, ds, dx, grad_norm
