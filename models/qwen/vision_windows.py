"""The vision tower's attention by SDPA, all windows of one length in one batched call.

Most layers of Qwen2.5-VL's tower attend within windows of 8 x 8 patches, smaller at an image's right and lower edge; the others,
and all of Qwen2-VL's, within one image. transformers' own SDPA way makes a call a window: hundreds an image, whose launches cost
more than their work. Windows are independent, so those of one length are rows of one batch, whichever image they belong to.

Letters: S patches of all images, h heads, d head size, n windows of one length L.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface

# transformers hands over all windows at once, with where they end, only where "flash" is part of the name.
WINDOWS_NAME = "sdpa_by_window_length_like_flash"


class WindowPlan(NamedTuple):
    """`groups`: (n, L) of each length. `order` (S,) brings their patches together and `back` undoes it; None where they lie so."""

    groups: list[tuple[int, int]]
    order: Tensor | None
    back: Tensor | None


_PLANS = WeakTensorKeyDictionary()  # every layer of a forward asks for the same two: the device is waited for twice, not 64 times


def plan_windows(ends: Tensor) -> WindowPlan:
    """The plan for windows that end before `ends[1:]` (S cumulated, from 0), kept as long as that tensor is."""
    if ends not in _PLANS:
        bounds = ends.tolist()
        windows = [(first, last - first) for first, last in zip(bounds, bounds[1:], strict=False) if last > first]
        lengths = sorted({length for _, length in windows}, reverse=True)
        groups = [(sum(length == one for _, length in windows), one) for one in lengths]
        order = back = None
        if len(groups) > 1:
            ranked = sorted(windows, key=lambda window: -window[1])  # stable
            order = torch.cat([torch.arange(first, first + length) for first, length in ranked]).to(ends.device)
            back = order.argsort()
        _PLANS[ends] = WindowPlan(groups, order, back)
    return _PLANS[ends]


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key and value (1, h, S, d) -> ((1, S, h, d), None), each patch attending to its window.

    Follows the signature of Hugging Face attention functions; `cu_seq_lens_q` are the ends of the windows, `max_length_q` is the
    length of the longest.
    """
    if torch.compiler.is_compiling() and max_length_q is not None:
        return _padded_windows(query, key, value, cu_seq_lens_q, max_length_q, scaling, dropout), None
    plan = plan_windows(cu_seq_lens_q)
    states = [x[0] if plan.order is None else x[0].index_select(1, plan.order) for x in (query, key, value)]
    outputs, start = [], 0
    for n, L in plan.groups:
        q, k, v = (x[:, start : start + n * L].unflatten(1, (n, L)).transpose(0, 1) for x in states)  # (n, h, L, d)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # (n L, h, d)
        start += n * L
    whole = torch.cat(outputs) if outputs else query[0].transpose(0, 1)
    return (whole if plan.back is None else whole.index_select(0, plan.back))[None], None


def _padded_windows(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, length: int, scaling: float | None, dropout: float
) -> Tensor:
    """The same as one call over windows padded to the longest, (n, h, L, d): one graph for all, as no size is read from `ends`."""
    steps = torch.arange(length, device=ends.device)
    inside = steps < ends.diff()[:, None]  # (n, L)
    places = torch.where(inside, ends[:-1, None] + steps, 0)
    q, k, v = (x[0][:, places].transpose(0, 1) for x in (query, key, value))
    seen = inside | (steps == 0)  # also an empty window sees something: its softmax would be NaN, and with it gradients
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], dropout_p=dropout, scale=scaling)
    patches = torch.arange(query.shape[2], device=ends.device)
    window = torch.bucketize(patches, ends[1:], right=True)
    return attended.transpose(1, 2)[window, patches - ends[window]][None]


AttentionInterface.register(WINDOWS_NAME, windowed_attention)
