"""Attention over a part of the keys, where no Triton runs: its output, its log-sum-exp, and how parts are put together.

    s = scale q k^T     l = log sum_j exp(s_j)     o = exp(s - l) v
    two parts of one softmax: l = log(exp l1 + exp l2)     o = exp(l1 - l) o1 + exp(l2 - l) o2
    gradients of a part, with the o and l of the whole: p = exp(s - l), delta = do . o, ds = scale p (do v^T - delta)
        dq = ds k     dk = ds^T q     dv = p^T do                 so dq of the parts adds up, as in ring attention

On a CPU this is PyTorch's flash kernel, which reads keys where they lie: heads that share a key head are views of stride 0.
Elsewhere (a GPU without Triton) it is three products.

Letters: A and h any two dimensions that share nothing (prompts, heads, answers), R queries, N keys, d head size.
"""

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """o [A, h, R, d] and l [A, h, R] of query [A, h, R, d], key and value [A, h, N, d]; `causal`: R = N, query r sees keys 0 to r.

    Without a key o is 0 and l is -inf. l is float32, or float64 for such queries.
    """
    if not query.numel() or not key.numel():
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.new_zeros(query.shape), query.new_full(query.shape[:-1], float("-inf"), dtype=wide)
    if _has_flash(query):
        return _forward(query, key, value, 0.0, causal, scale=scale)
    scores = _scores(query, key, scale, causal)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each of its tensor's shape, of the part that `attend` computes; `output`, `lse`: of the whole softmax."""
    if not query.numel() or not key.numel():
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    if _has_flash(query):
        return _backward(grad, query, key, value, output, lse, 0.0, causal, scale=scale)
    weights = (_scores(query, key, scale, causal) - lse[..., None]).exp()
    delta = (grad.to(lse.dtype) * output).sum(-1, keepdim=True)
    slopes = (weights * (grad @ value.mT - delta) * scale).to(query.dtype)
    return slopes @ key, slopes.mT @ query, weights.to(grad.dtype).mT @ grad


def merge(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """o and l of the softmax over the keys of both parts."""
    share = (l1 - l2).sigmoid()[..., None].to(o1.dtype)  # exp(l1 - l)
    return torch.lerp(o2, o1, share), torch.logaddexp(l1, l2)


def _has_flash(query: Tensor) -> bool:
    return query.device.type == "cpu"


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).mT) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores
