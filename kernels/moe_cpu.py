"""A mixture of SwiGLU experts on the CPU, an expert at a time: nothing of the size of all rows is kept but what two products made.

    for each expert e, its tokens s and their choices' weights w:
        a = x G_e^T    b = x U_e^T    i = silu(a) b    out_s += w i D_e^T                            a and b are kept
    t = dout_s D_e     dw = t . i     dD_e = (w dout)^T i     di = w t     db = di silu(a)     da = di b silu'(a)
    dG_e = da^T x      dU_e = db^T x      dx_s += da G_e + db U_e

Where a projection has a LoRA, x G_e^T stands for x G_e^T + scale drop(x) A_e^T B_e^T. S tokens, K choices of a token, M = S K rows
in the dispatched order (moe_routing.Routing), E experts, H hidden, I inner, r rank. 18 M H I FLOPs; kept are 2 M I elements, and
each expert's 3 n I live for its turn only. Neither the rows of x nor those of the output are ever in one place, and dw needs none
of them (as in SonicMoE, arXiv:2512.14080).

float32 products are oneDNN's where torch has it: its AVX-512 code runs on every maker's processors, torch.mm's (MKL) not. It
compiles a kernel for each size, so experts take their rows in steps of STEP, the last filled with zeros.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

STEP = 32


def _has_onednn(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, w: Tensor) -> Tensor:
    """x (n, in) w (out, in)^T of the CPU, (n, out), none of them empty. Both may be transposed views."""
    if _has_onednn(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return x @ w.T


class _Adapter(NamedTuple):
    """A LoRA of one expert's projection: A (r, in), B (out, r), its scale; `mask` (n, in) of what dropout lets through, or None."""

    A: Tensor
    B: Tensor
    scale: float
    mask: Tensor | None
    share: float

    def dropped(self, x: Tensor) -> Tensor:
        x = x.to(self.A.dtype)
        if self.mask is None:
            return x
        y, n = torch.zeros_like(x), len(self.mask)
        torch.mul(x[:n], self.mask, out=y[:n])
        return y.mul_(1 / (1 - self.share))


class _Expert(NamedTuple):
    """What an expert has to do: its `number`, its rows `begin` to `end`, and its `size` rows of a and b, zeros included."""

    number: int
    begin: int
    end: int
    place: int
    size: int


def _experts(ends: Tensor, dtype: torch.dtype) -> Iterator[_Expert]:
    """Those that have rows."""
    begin = place = 0
    step = STEP if _has_onednn(dtype) else 1
    for e, end in enumerate(ends.tolist()):
        size = -(-(end - begin) // step) * step
        if size:
            yield _Expert(e, begin, end, place, size)
        begin, place = end, place + size


def _most_rows(order: Tensor, ends: Tensor) -> int:
    return len(order) + len(ends) * (STEP - 1)


class _Projections:
    """The three projections' tensors, three stacked over experts or 3 E of them, and those of their adapters, alike."""

    def __init__(self, base: Sequence[Tensor], lora: Sequence[Tensor], masks: Sequence[Tensor], num_experts: int, adapters: Any):
        self.base = _by_projection(base, 3, num_experts)
        (adapted, self.scales, self.shares), given = adapters, iter(masks)
        matrices = iter(_by_projection(lora, 2 * sum(adapted), num_experts))
        self.lora = [(next(matrices), next(matrices)) if has else None for has in adapted]
        self.masks = [next(given) if share else None for share in self.shares]

    def adapter(self, which: int, expert: _Expert) -> _Adapter | None:
        pair, mask = self.lora[which], self.masks[which]
        if pair is None:
            return None
        part = None if mask is None else mask[expert.begin : expert.end]
        return _Adapter(pair[0][expert.number], pair[1][expert.number], self.scales[which], part, self.shares[which])

    def forward(self, which: int, expert: _Expert, x: Tensor) -> Tensor:
        """(size, out) of (size, in)."""
        y, adapter = product(x, self.base[which][expert.number]), self.adapter(which, expert)
        if adapter is not None:
            y += product(product(adapter.dropped(x), adapter.A), adapter.B).mul_(adapter.scale)
        return y

    def backward(self, which: int, expert: _Expert, grad: Tensor) -> Tensor:
        """The gradient (size, in) of what went in."""
        x, adapter = product(grad, self.base[which][expert.number].T), self.adapter(which, expert)
        if adapter is not None:
            inner = product(grad.to(adapter.B.dtype), adapter.B.T).mul_(adapter.scale)
            x += adapter.dropped(product(inner, adapter.A.T))
        return x


def _by_projection(tensors: Sequence[Tensor], groups: int, num_experts: int) -> list[Any]:
    """Each group's tensors by expert: a stacked one, or a list."""
    if len(tensors) == groups:
        return list(tensors)
    return [tensors[first : first + num_experts] for first in range(0, len(tensors), num_experts)]


def _rows(source: Tensor, token: Tensor, size: int) -> Tensor:
    """The tokens' rows and zeros: (size, H)."""
    rows = source.new_empty(size, source.shape[1])
    torch.index_select(source, 0, token, out=rows[: len(token)])
    rows[len(token) :].zero_()
    return rows


@custom_op("vesalius::moe_mlp_cpu", mutates_args=())
def moe_mlp_cpu(
    hidden: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    base: Sequence[Tensor],
    lora: Sequence[Tensor],
    masks: Sequence[Tensor],
    adapted: Sequence[bool],
    scales: Sequence[float],
    shares: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (S, H) in the type of `weights` (S, K), and a and b where they are to be kept for a backward.

    `base` and `lora` (A, then B, of each projection that is `adapted`): stacked over experts, or each expert's. `masks` (M, in)
    bool for the projections whose `shares`, of dropout, are not 0.
    """
    projections = _Projections(base, lora, masks, len(ends), (adapted, scales, shares))
    width, K = projections.base[0][0].shape[0], weights.shape[1]
    kept = [hidden.new_empty(_most_rows(order, ends) if keep else 0, width) for _ in range(2)]
    out = weights.new_zeros(hidden.shape)
    for expert in _experts(ends, hidden.dtype):
        choice = order[expert.begin : expert.end]
        x = _rows(hidden, choice // K, expert.size)
        a, b = (projections.forward(which, expert, x) for which in (0, 1))
        if keep:
            for whole, part in zip(kept, (a, b), strict=True):
                whole[expert.place : expert.place + expert.size] = part
        y = projections.forward(2, expert, F.silu(a, inplace=True).mul_(b))[: len(choice)].to(out.dtype)
        out.index_add_(0, choice // K, y.mul_(weights.flatten()[choice, None]))
    return out, kept[0], kept[1]


@moe_mlp_cpu.register_fake
def _(hidden, weights, order, ends, base, lora, masks, adapted, scales, shares, keep):
    kept = [hidden.new_empty(_most_rows(order, ends) if keep else 0, base[0].shape[-2]) for _ in range(2)]
    return weights.new_empty(hidden.shape), *kept


@custom_op("vesalius::moe_mlp_cpu_backward", mutates_args=())
def moe_mlp_cpu_backward(
    grad: Tensor,
    hidden: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    base: Sequence[Tensor],
    lora: Sequence[Tensor],
    masks: Sequence[Tensor],
    adapted: Sequence[bool],
    scales: Sequence[float],
    shares: Sequence[float],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of hidden, weights, base and lora in this order, empty where not `needed`."""
    num_experts, K = len(ends), weights.shape[1]
    projections = _Projections(base, lora, masks, num_experts, (adapted, scales, shares))
    grads = _empty([hidden, weights, *base, *lora], needed)
    for tensor in [grads[1], *_without_rows(grads[2:], ends)]:
        tensor.zero_()
    of_base = _by_projection(grads[2 : 2 + len(base)], 3, num_experts)
    of_lora = iter(_by_projection(grads[2 + len(base) :], 2 * sum(adapted), num_experts))
    pairs = [(next(of_lora), next(of_lora)) if has else None for has in adapted]
    grad_hidden = weights.new_zeros(hidden.shape if needed[0] else 0)

    def learn(which: int, expert: _Expert, x: Tensor, grad: Tensor) -> None:
        """The gradients of a projection's own tensors."""
        whole, pair, adapter = of_base[which][expert.number], pairs[which], projections.adapter(which, expert)
        if whole.numel():
            whole.copy_(product(grad.T, x.T))
        if pair is None or adapter is None:
            return
        grad, dropped, (of_A, of_B) = grad.to(adapter.B.dtype), adapter.dropped(x), (part[expert.number] for part in pair)
        if of_B.numel():
            of_B.copy_(product(grad.T, product(dropped, adapter.A).T)).mul_(adapter.scale)
        if of_A.numel():
            of_A.copy_(product(product(grad, adapter.B.T).T, dropped.T)).mul_(adapter.scale)

    for expert in _experts(ends, hidden.dtype):
        choice, place = order[expert.begin : expert.end], slice(expert.place, expert.place + expert.size)
        token, n = choice // K, len(choice)
        weight = F.pad(weights.flatten()[choice], (0, expert.size - n))[:, None]
        dy = _rows(grad, token, expert.size)
        di = projections.backward(2, expert, dy.to(hidden.dtype))
        inner = F.silu(a[place]).mul_(b[place])
        if needed[1]:
            grads[1].view(-1)[choice] = (di[:n].to(weights.dtype) * inner[:n]).sum(-1)
        learn(2, expert, inner, (dy.to(weights.dtype) * weight).to(hidden.dtype))
        del inner
        di = (di * weight).to(hidden.dtype) if di.dtype != weight.dtype else di.mul_(weight)
        db = F.silu(a[place]).mul_(di)
        da = torch.ops.aten.silu_backward(di.mul_(b[place]), a[place])
        del di
        x = _rows(hidden, token, expert.size)
        learn(0, expert, x, da)
        learn(1, expert, x, db)
        if needed[0]:
            dx = projections.backward(0, expert, da).add_(projections.backward(1, expert, db))
            grad_hidden.index_add_(0, token, dx[:n].to(grad_hidden.dtype))
    grads[0] = grad_hidden.to(hidden.dtype)
    return grads


def _empty(tensors: list[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape if need else (len(tensor), 0)) for tensor, need in zip(tensors, needed, strict=True)]


def _without_rows(grads: Sequence[Tensor], ends: Tensor) -> Iterator[Tensor]:
    """The gradients of the experts that no token chose."""
    num_experts = len(ends)
    empty = [e for e, count in enumerate(ends.diff(prepend=ends.new_zeros(1)).tolist()) if not count]
    for index, grad in enumerate(grads):
        if grad.dim() == 3:
            yield from (grad[e] for e in empty)
        elif index % num_experts in empty:
            yield grad


@moe_mlp_cpu_backward.register_fake
def _(grad, hidden, weights, order, ends, a, b, base, lora, masks, adapted, scales, shares, needed):
    return _empty([hidden, weights, *base, *lora], needed)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weights, order, ends, base, lora, masks, *ctx.rest, _ = inputs
    _, a, b = output
    ctx.mark_non_differentiable(a, b)
    ctx.lengths = [5 + 1, len(base), len(lora), len(masks)]
    ctx.save_for_backward(hidden, weights, order, ends, a, b, *base, *lora, *masks)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    saved, parts = list(ctx.saved_tensors), []
    for length in ctx.lengths:
        parts.append(saved[:length])
        saved = saved[length:]
    (hidden, weights, order, ends, a, b), base, lora, masks = parts
    need_hidden, need_weights, _, _, need_base, need_lora, *_ = ctx.needs_input_grad
    needed = [need_hidden, need_weights, *need_base, *need_lora]
    grads = moe_mlp_cpu_backward(grad.contiguous(), hidden, weights, order, ends, a, b, base, lora, masks, *ctx.rest, needed)
    given = [part if need else None for part, need in zip(grads, needed, strict=True)]
    of_base, of_lora = given[2 : 2 + len(base)], given[2 + len(base) :]
    return given[0], given[1], None, None, of_base, of_lora, [None] * len(masks), None, None, None, None


moe_mlp_cpu.register_autograd(_backward, setup_context=_keep)
