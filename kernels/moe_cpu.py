"""A mixture of SwiGLU experts on the CPU, in pieces: one expert's tokens and a block of inner columns at a time.

    for each expert e, its tokens s and their choices' weights w, and each block J of columns:
        a = x G_J^T    b = x U_J^T    i = silu(a) b    y += i D_J^T           then out_s += w y; a and b are kept
    t = dout_s D_J     dw += t . i    dD_J = dout_s^T (w i)    di = w t     db = di silu(a)     da = di b silu'(a)
    dG_J = da^T x      dU_J = db^T x      dx_s += da G_J + db U_J

Where a projection has a LoRA, x W^T stands for x W^T + (scale drop(x) A^T) B^T, the second added in place. S tokens, K
choices of a token, M = S K rows in the dispatched order (moe_routing.Routing), E experts, H hidden, I inner, r rank. It takes
18 M H I FLOPs, 12 M H I where the weights are frozen, and keeps 2 M I elements. Beside them live, for an expert with n rows, 3 n H
elements and 4 n COLUMNS of a block; a product writes its part of a weight's gradient where it belongs, and dw needs no row of the
output (as in SonicMoE, arXiv:2512.14080).

float32 products with AVX-512 are oneDNN's where torch has it: its code for it runs on every maker's processors, torch.mm's (MKL)
not. It compiles a kernel for each size, so experts take their rows in steps of STEP, the last filled with zeros.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

STEP = 32
COLUMNS = 704
ALL = slice(None)


def has_onednn(dtype: torch.dtype) -> bool:
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return (
        wide and dtype == torch.float32 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(x: Tensor, w: Tensor) -> Tensor:
    """x (n, in) w (out, in)^T of the CPU, (n, out), none of them empty. Both may be transposed views or blocks."""
    if not has_onednn(x.dtype):
        return torch.mm(x, w.T)
    return torch.ops.mkldnn._linear_pointwise(x, _in_one_piece(w), None, "none", [], "")


def _in_one_piece(w: Tensor) -> Tensor:
    """w, or a copy where it is a block of columns or the transpose of one: for these oneDNN has plain loops alone, which take a
    thousand times as long."""
    if w.is_contiguous() or w.T.is_contiguous():
        return w
    return w.contiguous() if w.stride(1) == 1 else w.T.contiguous().T


def put_product(y: Tensor, x: Tensor, w: Tensor, add: bool = False) -> Tensor:
    """y (n, out), which may be a block or in a wider type, becomes `product` of the two, or has it added."""
    if x.dtype == y.dtype and not has_onednn(x.dtype):
        return y.addmm_(x, w.T, beta=int(add))
    return y.add_(product(x, w)) if add else y.copy_(product(x, w))


class _Expert(NamedTuple):
    """What an expert has to do: its `number` among those at hand, its rows `begin` to `end`, and its `size` rows of a and b."""

    number: int
    begin: int
    end: int
    place: int
    size: int


def _experts(ends: Tensor, first: int, count: int, dtype: torch.dtype) -> Iterator[_Expert]:
    """Those of the `count` from `first` on that have rows."""
    bounds, place = [0, *ends.tolist()][first : first + count + 1], 0
    step = STEP if has_onednn(dtype) else 1
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        size = -(-(end - begin) // step) * step
        if size:
            yield _Expert(number, begin, end, place, size)
        place += size


def kept_rows(order: Tensor, ends: Tensor, first: int, count: int, dtype: torch.dtype) -> int:
    """The rows of a and b that `count` experts from `first` on need; while a graph is traced, at most."""
    if torch.compiler.is_compiling():
        return len(order) + count * (STEP - 1)
    return sum(expert.size for expert in _experts(ends, first, count, dtype))


class _Linear:
    """One expert's projection: its weight (out, in), its LoRA if it has one, and where the gradients of these go.

    The inner width I is taken by blocks J: of `rows` of the weight in gate and up, of `columns` in down. `a` (n, r) is what the
    LoRA's A makes of the input, `g` (n, r) the gradient of that; both grow block by block.
    """

    def __init__(self, tensors: list[Tensor], grads: list[Tensor], scale: float, mask: Tensor | None, share: float, size: int):
        (self.weight, *pair), self.grads, self.mask, self.share, self.scale = tensors, grads, mask, share, scale
        self.adapted = bool(pair)
        if pair:
            self.A, self.B = pair[0] * scale, pair[1]
            self.a, self.g = (self.A.new_zeros(size, len(self.A)) for _ in range(2))

    def dropped(self, x: Tensor, columns: slice) -> Tensor:
        """A block of the LoRA's input, or of its gradient, without what dropout took."""
        x = x.to(self.A.dtype)
        if self.mask is None:
            return x
        y, n = torch.zeros_like(x), len(self.mask)
        torch.mul(x[:n], self.mask[:, columns], out=y[:n])
        return y.mul_(1 / (1 - self.share))

    def read(self, x: Tensor, columns: slice = ALL) -> None:
        if self.adapted:
            put_product(self.a, self.dropped(x, columns), self.A[:, columns], add=True)

    def block_of(self, x: Tensor, rows: slice, out: Tensor | None) -> Tensor:
        """(n, rows) of the output, of an input that was read."""
        y = product(x, self.weight[rows]) if out is None else put_product(out, x, self.weight[rows])
        if self.adapted:
            put_product(y, self.a, self.B[rows], add=True)
        return y

    def add_block(self, y: Tensor, x: Tensor, columns: slice) -> None:
        """To the output, which the first begins, a block of the input's part; the LoRA's comes with `add_adapted`."""
        put_product(y, x, self.weight[:, columns], add=columns.start > 0)
        self.read(x, columns)

    def add_adapted(self, y: Tensor) -> None:
        if self.adapted:
            put_product(y, self.a, self.B, add=True)

    def read_grad(self, grad: Tensor, rows: slice = ALL) -> None:
        if self.adapted:
            put_product(self.g, grad.to(self.B.dtype), self.B[rows].T, add=True)

    def grad_block(self, grad: Tensor, columns: slice) -> Tensor:
        """(n, columns) of the input's gradient, of a gradient that was read."""
        x = product(grad, self.weight[:, columns].T)
        if self.adapted:
            x += self.dropped(product(self.g, self.A[:, columns].T), columns)
        return x

    def add_grad_block(self, x: Tensor, grad: Tensor, rows: slice, add: bool) -> None:
        """To the input's gradient, or as its beginning, the part of a block; the LoRA's comes with `add_adapted_grad`."""
        put_product(x, grad, self.weight[rows].T, add)

    def add_adapted_grad(self, x: Tensor) -> None:
        if self.adapted:
            x += self.dropped(product(self.g, self.A.T), ALL)

    def learn(self, grad: Tensor, x: Tensor, rows: slice = ALL, columns: slice = ALL) -> None:
        """The weight's gradient in a block of rows or columns."""
        if self.grads[0].numel():
            put_product(self.grads[0][rows, columns], grad.T, x.T)

    def learn_A(self, x: Tensor, columns: slice = ALL) -> None:
        if self.adapted and self.grads[1].numel():
            put_product(self.grads[1][:, columns], self.g.T, self.dropped(x, columns).T).mul_(self.scale)

    def learn_B(self, grad: Tensor, rows: slice = ALL) -> None:
        if self.adapted and self.grads[2].numel():
            put_product(self.grads[2][rows], grad.T.to(self.B.dtype), self.a.T)


class _Projections:
    """The tensors of gate, up and down, stacked over experts or a list, those of their LoRAs, and the gradients of all."""

    def __init__(self, base: Sequence[Tensor], lora: Sequence[Tensor], masks: Sequence[Tensor], adapters: Any, grads: Any = ()):
        (adapted, self.scales, self.shares), given = adapters, iter(masks)
        self.masks = [next(given) if share else None for share in self.shares]
        each = 0 if base[0].dim() == 3 else len(base) // 3
        self.tensors = _by_projection(base, lora, adapted, each)
        self.grads = _by_projection(grads[: len(base)], grads[len(base) :], adapted, each) if grads else None
        self.count, self.inner = len(self.tensors[0][0]), self.tensors[0][0][0].shape[0]

    def blocks(self) -> Iterator[slice]:
        """Of the inner columns, about equal ones, whole cache lines."""
        width = -(-self.inner // -(-self.inner // COLUMNS))
        width = -(-width // 16) * 16
        yield from (slice(begin, min(begin + width, self.inner)) for begin in range(0, self.inner, width))

    def of(self, expert: _Expert) -> tuple[_Linear, ...]:
        def linear(which: int) -> _Linear:
            tensors, grads = (
                [] if every is None else [each[expert.number] for each in every[which]] for every in (self.tensors, self.grads)
            )
            mask = self.masks[which]
            part = None if mask is None else mask[expert.begin : expert.end]
            return _Linear(tensors, grads, self.scales[which], part, self.shares[which], expert.size)

        return tuple(linear(which) for which in range(3))


def _by_projection(base: Sequence[Tensor], lora: Sequence[Tensor], adapted: Sequence[bool], each: int) -> list[list[Any]]:
    """For gate, up and down: weight and, where adapted, A and B, by expert: lists of `each`, or where that is 0 stacked tensors."""

    def groups(tensors: Sequence[Tensor]) -> Iterator[Any]:
        yield from (tensors[at : at + each] for at in range(0, len(tensors), each)) if each else tensors

    weights, matrices = groups(base), groups(lora)
    return [[next(weights), *((next(matrices), next(matrices)) if has else ())] for has in adapted]


def _rows(source: Tensor, token: Tensor, size: int) -> Tensor:
    """The tokens' rows and zeros: (size, H)."""
    rows = source.new_empty(size, source.shape[1])
    torch.index_select(source, 0, token, out=rows[: len(token)])
    rows[len(token) :].zero_()
    return rows


def _block(kept: Tensor, expert: _Expert, columns: slice) -> Tensor:
    """An expert's block (size, columns) of a or b, in one piece of `kept`."""
    begin = expert.place * kept.shape[1] + expert.size * columns.start
    return kept.view(-1)[begin : begin + expert.size * (columns.stop - columns.start)].view(expert.size, -1)


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
    first: int,
    room: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the experts from `first` on in the output (S, H), in the type of `weights` (S, K), and a and b (room, I).

    `base` and `lora` (A, then B, of each projection that is `adapted`): stacked over experts, or each expert's. `masks` (M, in)
    bool for the projections whose `shares`, of dropout, are not 0. `room`: 0, where there is no backward, or `kept_rows`.
    """
    projections, K = _Projections(base, lora, masks, (adapted, scales, shares)), weights.shape[1]
    kept = [hidden.new_empty(room, projections.inner) for _ in range(2)]
    out = weights.new_zeros(hidden.shape)
    for expert in _experts(ends, first, projections.count, hidden.dtype):
        choice = order[expert.begin : expert.end]
        token = (choice // K).int()
        x, y = _rows(hidden, token, expert.size), weights.new_empty(expert.size, hidden.shape[1])
        gate, up, down = projections.of(expert)
        gate.read(x)
        up.read(x)
        for J in projections.blocks():
            a, b = (
                linear.block_of(x, J, _block(whole, expert, J) if room else None)
                for linear, whole in zip((gate, up), kept, strict=True)
            )
            down.add_block(y, F.silu(a, inplace=not room).mul_(b), J)
        down.add_adapted(y)
        out.index_add_(0, token, y[: len(choice)].mul_(weights.flatten()[choice, None]))
    return out, kept[0], kept[1]


@moe_mlp_cpu.register_fake
def _(hidden, weights, order, ends, base, lora, masks, adapted, scales, shares, first, room):
    kept = [hidden.new_empty(room, base[0].shape[-2]) for _ in range(2)]
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
    first: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of hidden, weights, base and lora in this order, empty where not `needed`."""
    K, adapters = weights.shape[1], (adapted, scales, shares)
    grads = _empty([hidden, weights, *base, *lora], needed)
    projections = _Projections(base, lora, masks, adapters, grads[2:])
    for tensor in [grads[1], *_without_rows(grads[2:], ends, first, projections.count)]:
        tensor.zero_()
    grad_hidden = weights.new_zeros(hidden.shape if needed[0] else 0)
    for expert in _experts(ends, first, projections.count, hidden.dtype):
        choice = order[expert.begin : expert.end]
        n, token = len(choice), (choice // K).int()
        weight = F.pad(weights.flatten()[choice], (0, expert.size - n))[:, None]
        dy, x = (_rows(source, token, expert.size).to(hidden.dtype) for source in (grad, hidden))
        dx, dw = weights.new_empty(dy.shape), weights.new_zeros(expert.size, 1)
        gate, up, down = projections.of(expert)
        gate.read(x)
        up.read(x)
        down.read_grad(dy)
        for J in projections.blocks():
            a_J, b_J = (_block(whole, expert, J) for whole in (a, b))
            di, silu = down.grad_block(dy, J), F.silu(a_J)
            inner = silu * b_J
            if needed[1]:
                dw += (di * inner).sum(-1, keepdim=True, dtype=dw.dtype)
            inner *= weight
            down.learn(dy, inner, columns=J)
            down.learn_A(inner, J)
            down.read(inner, J)
            del inner
            di *= weight
            db = silu.mul_(di)
            da = torch.ops.aten.silu_backward(di.mul_(b_J), a_J)
            for linear, grad_J in ((gate, da), (up, db)):
                linear.learn(grad_J, x, rows=J)
                linear.learn_B(grad_J, J)
                linear.read_grad(grad_J, J)
                if needed[0]:
                    linear.add_grad_block(dx, grad_J, J, add=J.start > 0 or linear is up)
        down.learn_B(dy)
        gate.learn_A(x)
        up.learn_A(x)
        if needed[0]:
            gate.add_adapted_grad(dx)
            up.add_adapted_grad(dx)
            grad_hidden.index_add_(0, token, dx[:n])
        if needed[1]:
            grads[1].view(-1)[choice] = dw[:n, 0]
    grads[0] = grad_hidden.to(hidden.dtype)
    return grads


def _empty(tensors: list[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape if need else (len(tensor), 0)) for tensor, need in zip(tensors, needed, strict=True)]


def _without_rows(grads: Sequence[Tensor], ends: Tensor, first: int, count: int) -> Iterator[Tensor]:
    """The gradients of the experts that no token chose."""
    bounds = [0, *ends.tolist()][first : first + count + 1]
    empty = [number for number, (begin, end) in enumerate(itertools.pairwise(bounds)) if begin == end]
    for index, grad in enumerate(grads):
        if grad.dim() == 3:
            yield from (grad[number] for number in empty)
        elif index % count in empty:
            yield grad


@moe_mlp_cpu_backward.register_fake
def _(grad, hidden, weights, order, ends, a, b, base, lora, masks, adapted, scales, shares, first, needed):
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
    return given[0], given[1], None, None, of_base, of_lora, [None] * len(masks), *[None] * 5


moe_mlp_cpu.register_autograd(_backward, setup_context=_keep)
