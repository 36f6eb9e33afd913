"""A mixture of SwiGLU experts over routed tokens: rows to experts, three products an expert, and their weighted sum for each token.

    r_j = x_s for the choice (s, k) in row j      y_j = (silu(r_j G_e^T) * (r_j U_e^T)) D_e^T      out_s = sum_k w_sk y_slot(s,k)
    dy_j = w_sk dout_s, dw_sk = dout_s . y_j      dx_s = sum_k dr_slot(s,k)                        dG_e = (of its rows) da^T r_e

S tokens, H hidden, I inner, E experts, K choices of a token, S K rows (moe_routing.Routing), of which those past the last expert's
are zeros or undefined and nobody reads. Both ways are one kernel each, a token a program: dispatch reads S H and writes S K H
elements, combine the reverse with its sum in float32; the gradient of each is the other. DeepSpeed's einsums with [S, E, C] masks
take 2 S E C H FLOPs each (arXiv:2201.05596). The products are cuBLAS's, an expert at a time up to FEW_EXPERTS, for whose sizes the
host waits once, and beyond that F.grouped_mm, which waits for nothing. On the CPU moe_cpu.py does all of it, expert by expert.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from kernels.language import tl, triton
from kernels.launch import LaunchConfig, launch, padded_power, runs_triton
from kernels.moe_cpu import kept_rows, moe_mlp_cpu
from kernels.moe_routing import Routing

FEW_EXPERTS = 8
GROUPS = 4  # of experts on the CPU
ALIGNED = 16  # bytes to which F.grouped_mm wants strides
BLOCK = 4096  # columns a program takes at a time


class ExpertLinear(NamedTuple):
    """A projection of E experts: `weight` (E, out, in), or E of (out, in); with LoRA lora_A (r, in) and lora_B (out, r), scaled.

    `dropout`: the share of lora_A's input that is set to zero at random, the rest scaled up, as PEFT does in training.
    """

    weight: Tensor | Sequence[Tensor]
    lora_A: Tensor | Sequence[Tensor] | None = None
    lora_B: Tensor | Sequence[Tensor] | None = None
    scale: float = 1.0
    dropout: float = 0.0


Projection = ExpertLinear | Tensor  # a tensor is the weight


def _linear(projection: Projection) -> ExpertLinear:
    return ExpertLinear(projection) if isinstance(projection, Tensor) else projection


def moe_mlp_reference(
    hidden: Tensor, routing: Routing, gate_proj: Projection, up_proj: Projection, down_proj: Projection
) -> Tensor:
    """The specification of `moe_mlp`, an expert at a time."""
    gate, up, down = (_linear(projection) for projection in (gate_proj, up_proj, down_proj))

    def project(x: Tensor, linear: ExpertLinear, e: int) -> Tensor:
        y = x @ linear.weight[e].T
        if linear.lora_A is None or linear.lora_B is None:
            return y
        return y + linear.scale * (F.dropout(x, linear.dropout) @ linear.lora_A[e].T @ linear.lora_B[e].T)

    out = torch.zeros_like(hidden, dtype=routing.weights.dtype)
    for e in range(len(gate.weight)):
        token, k = ((routing.experts == e) & (routing.slots >= 0)).nonzero(as_tuple=True)
        x = hidden[token]
        y = project(F.silu(project(x, gate, e)) * project(x, up, e), down, e)
        out = out.index_add(0, token, routing.weights[token, k, None] * y)
    return out.to(hidden.dtype)


@triton.jit
def _spread_kernel(
    source, slots, order, weights, rows, target, grad_weights, H, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):
    # A token to the rows of its choices, times their weights where given; grad_weights are its products with `rows` there. Each
    # program also clears those of the K rows at its own place that belong to nobody
    token = tl.program_id(0).to(tl.int64)
    k_column = tl.arange(0, KP)
    product = tl.zeros([KP], tl.float32)
    for first in range(0, H, BLOCK):
        h = first + tl.arange(0, BLOCK)
        x = tl.load(source + token * H + h, mask=h < H, other=0.0)
        for k in tl.static_range(K):
            slot = tl.load(slots + token * K + k).to(tl.int64)
            kept = slot >= 0
            here = tl.where(kept, slot, 0) * H + h
            if weights is None:
                tl.store(target + here, x, mask=(h < H) & kept)
            else:
                y = tl.load(rows + here, mask=(h < H) & kept, other=0.0).to(tl.float32)
                product += tl.where(k_column == k, tl.sum(x.to(tl.float32) * y, 0), 0.0)
                scaled = x.to(tl.float32) * tl.load(weights + token * K + k)
                tl.store(target + here, scaled.to(target.dtype.element_ty), mask=(h < H) & kept)
            free = tl.load(order + token * K + k) < 0
            nothing = tl.zeros([BLOCK], target.dtype.element_ty)
            tl.store(target + (token * K + k) * H + h, nothing, mask=(h < H) & free)
    if weights is not None:
        tl.store(grad_weights + token * K + k_column, product, mask=k_column < K)


@triton.jit
def _collect_kernel(rows, slots, weights, target, H, K: tl.constexpr, BLOCK: tl.constexpr):
    # The rows of a token's choices, times their weights where given, summed in float32
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slots + token * K + k).to(tl.int64)
        kept = slot >= 0
        y = tl.load(rows + tl.where(kept, slot, 0) * H + h, mask=(h < H) & kept, other=0.0).to(tl.float32)
        if weights is not None:
            y *= tl.load(weights + token * K + k)
        total += y
    tl.store(target + token * H + h, total.to(target.dtype.element_ty), mask=h < H)


def _spread_constants(H: int, K: int) -> dict[str, Any]:
    block = padded_power(H, BLOCK)
    return {"K": K, "KP": padded_power(K), "BLOCK": block, "num_warps": 8 if block > 2048 else 4}


def _collect_constants(H: int, K: int) -> dict[str, Any]:
    block = padded_power(H, 2048)
    return {"K": K, "BLOCK": block, "num_warps": 4}


def launch_configs() -> Iterator[LaunchConfig]:
    """4096 wide, one choice and eight."""
    x, w, i = (torch.empty(0, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32, torch.int32))
    for K in (1, 2, 8):
        spread, collect = _spread_constants(4096, K), _collect_constants(4096, K)
        yield LaunchConfig(f"moe dispatch, K={K}", _spread_kernel, (x, i, i, None, None, x, None, 4096), spread)
        yield LaunchConfig(f"moe dispatch, backward, K={K}", _collect_kernel, (x, i, None, x, 4096), collect)
        yield LaunchConfig(f"moe combine, K={K}", _collect_kernel, (x, i, w, x, 4096), collect)
        yield LaunchConfig(f"moe combine, backward, K={K}", _spread_kernel, (x, i, i, w, x, x, w, 4096), spread)


def _collect(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """(S, H): the sum of a token's rows."""
    (S, K), H = slots.shape, rows.shape[1]
    if runs_triton(rows) and S:
        target, constants = rows.new_empty(S, H), _collect_constants(H, K)
        arguments = (rows.contiguous(), slots.contiguous(), None if weights is None else weights.contiguous(), target, H)
        launch(_collect_kernel, (S, triton.cdiv(H, constants["BLOCK"])), *arguments, **constants)
        return target
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = rows.new_zeros(S, H, dtype=dtype)
    for k, slot in enumerate(slots.unbind(1)):
        y = rows.index_select(0, slot.clamp(min=0)).masked_fill_((slot < 0)[:, None], 0).to(dtype)
        total.add_(y) if weights is None else total.addcmul_(y, weights[:, k, None])
    return total.to(rows.dtype)


def _tokens_of(order: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The token of each row, and which rows belong to nobody."""
    return order.clamp(min=0) // top_k, (order < 0)[:, None]


@custom_op("vesalius::moe_dispatch", mutates_args=())
def moe_dispatch(hidden: Tensor, slots: Tensor, order: Tensor) -> Tensor:
    """Rows (S K, H) in the dispatched order of tokens (S, H); those past the last are zero."""
    (S, K), H = slots.shape, hidden.shape[1]
    if runs_triton(hidden) and S:
        target = hidden.new_empty(S * K, H)
        arguments = (hidden.contiguous(), slots.contiguous(), order.contiguous(), None, None, target, None, H)
        launch(_spread_kernel, (S,), *arguments, **_spread_constants(H, K))
        return target
    token, free = _tokens_of(order, K)
    return hidden.index_select(0, token).masked_fill_(free, 0)


@moe_dispatch.register_fake
def _(hidden, slots, order):
    return hidden.new_empty(slots.numel(), hidden.shape[1])


@custom_op("vesalius::moe_combine", mutates_args=())
def moe_combine(rows: Tensor, slots: Tensor, order: Tensor, weights: Tensor | None) -> Tensor:
    """Sums (S, H) of the rows of each token, times weights (S, K) where given."""
    return _collect(rows, slots, weights)


@moe_combine.register_fake
def _(rows, slots, order, weights):
    return rows.new_empty(len(slots), rows.shape[1])


@custom_op("vesalius::moe_combine_backward", mutates_args=())
def moe_combine_backward(grad: Tensor, rows: Tensor, slots: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(drows, dweights); rows past the last are zero."""
    (S, K), H = slots.shape, rows.shape[1]
    if runs_triton(rows) and S:
        target, grad_weights = rows.new_empty(S * K, H), weights.new_empty(S, K)
        given = (weights.contiguous(), rows.contiguous(), target, grad_weights)
        arguments = (grad.contiguous(), slots.contiguous(), order.contiguous(), *given, H)
        launch(_spread_kernel, (S,), *arguments, **_spread_constants(H, K))
        return target, grad_weights
    token, free = _tokens_of(order, K)
    of_rows = weights.flatten().index_select(0, order.clamp(min=0))[:, None]
    grad_rows = grad.index_select(0, token).to(weights.dtype).mul_(of_rows).to(rows.dtype).masked_fill_(free, 0)
    products = []
    for slot in slots.unbind(1):
        y = rows.index_select(0, slot.clamp(min=0)).masked_fill_((slot < 0)[:, None], 0)
        products.append((y.to(weights.dtype) * grad).sum(-1))
    return grad_rows, torch.stack(products, 1)


@moe_combine_backward.register_fake
def _(grad, rows, slots, order, weights):
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dispatch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, slots, order = ctx.saved_tensors
    return moe_combine(grad, slots, order, None), None, None


def _keep_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots, order = inputs
    ctx.save_for_backward(slots, slots, order)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, slots, order, weights = ctx.saved_tensors
    if weights is None:
        return moe_dispatch(grad, slots, order), None, None, None
    grad_rows, grad_weights = moe_combine_backward(grad, rows, slots, order, weights)
    return grad_rows, None, None, grad_weights


moe_dispatch.register_autograd(_dispatch_backward, setup_context=_keep_order)
moe_combine.register_autograd(_combine_backward, setup_context=_keep)


# Devices and dtypes that have shown to have no grouped product.
_WITHOUT_GROUPED: set[tuple[str, torch.dtype]] = set()


def _grouped(rows: Tensor, weights: Sequence[Tensor], ends: Tensor) -> bool:
    """Whether F.grouped_mm is asked: for many experts, whose strides are multiples of 16 bytes."""
    aligned = not any(side * rows.dtype.itemsize % ALIGNED for side in weights[0].shape[-2:])
    return len(ends) > FEW_EXPERTS and aligned and (rows.device.type, rows.dtype) not in _WITHOUT_GROUPED


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor | None:
    """F.grouped_mm; None where there is none, which is tried once."""
    try:
        return F.grouped_mm(left, right, offs=ends)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError):  # AttributeError: a torch without it
        _WITHOUT_GROUPED.add((left.device.type, left.dtype))
        return None


def _parts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        yield e, slice(begin, end)
        begin = end


@custom_op("vesalius::grouped_linear", mutates_args=())
def grouped_linear_forward(rows: Tensor, weights: Sequence[Tensor], ends: Tensor, transposed: bool) -> Tensor:
    """Rows of expert e times its weight^T, or times its weight where `transposed`; past the last expert's zero, or undefined.

    `weights` are E of (out, in), or one of (E, out, in).
    """
    stacked = weights[0].dim() == 3
    if _grouped(rows, weights, ends):
        whole = weights[0].contiguous() if stacked else torch.stack(list(weights))
        product = _grouped_mm(rows.contiguous(), whole if transposed else whole.transpose(1, 2), ends)
        if product is not None:
            return product
    each = weights[0].unbind() if stacked else weights
    out, last = rows.new_empty(len(rows), each[0].shape[1 if transposed else 0]), 0
    for e, part in _parts(ends):
        torch.mm(rows[part], each[e] if transposed else each[e].T, out=out[part])
        last = part.stop
    out[last:].zero_()
    return out


@grouped_linear_forward.register_fake
def _(rows, weights, ends, transposed):
    return rows.new_empty(len(rows), weights[0].shape[-1 if transposed else -2])


@custom_op("vesalius::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, rows: Tensor, weights: Sequence[Tensor], ends: Tensor) -> Tensor:
    """(E, out, in): grad^T rows of each expert's."""
    if _grouped(rows, weights, ends):
        product = _grouped_mm(grad.contiguous().t(), rows.contiguous(), ends)
        if product is not None:
            return product
    total = rows.new_empty(len(ends), *weights[0].shape[-2:])
    for e, part in _parts(ends):
        torch.mm(grad[part].T, rows[part], out=total[e])
    return total


@grouped_outer.register_fake
def _(grad, rows, weights, ends):
    return rows.new_empty(len(ends), *weights[0].shape[-2:])


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, ends, ctx.transposed = inputs
    ctx.save_for_backward(rows, ends, *weights)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, ends, *weights = ctx.saved_tensors
    need_rows, need_weights, *_ = ctx.needs_input_grad
    grad_rows = grouped_linear_forward(grad.contiguous(), weights, ends, not ctx.transposed) if need_rows else None
    grad_weights: list[Tensor | None] = [None] * len(weights)
    if any(need_weights):
        left, right = (rows, grad) if ctx.transposed else (grad, rows)
        total = grouped_outer(left, right, weights, ends)
        grad_weights = [total] if weights[0].dim() == 3 else list(total.unbind())
    return grad_rows, grad_weights, None, None


grouped_linear_forward.register_autograd(_grouped_backward, setup_context=_keep_operands)


def grouped_linear(rows: Tensor, weight: Tensor | Sequence[Tensor], ends: Tensor) -> Tensor:
    """Rows (M, in) of expert e times weight[e]^T, (M, out); `ends` (E,) int32 is the row past each expert's last.

    Differentiable in rows and weights. Under autocast both are taken to its type, else the rows to the weights'.
    """
    device, parts = rows.device.type, [weight] if isinstance(weight, Tensor) else weight
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parts[0].dtype
    weights = [part.to(dtype) for part in parts]
    return grouped_linear_forward(rows.to(dtype), weights, ends, False)


def _project(rows: Tensor, linear: ExpertLinear, ends: Tensor) -> Tensor:
    y = grouped_linear(rows, linear.weight, ends)
    if linear.lora_A is None or linear.lora_B is None:
        return y
    inner = grouped_linear(F.dropout(rows, linear.dropout), linear.lora_A, ends)
    return (y + linear.scale * grouped_linear(inner, linear.lora_B, ends)).to(y.dtype)


def _in_rows(hidden: Tensor, routing: Routing, linears: tuple[ExpertLinear, ...]) -> Tensor:
    """All rows at once, through each projection in turn."""
    few, (gate, up, down) = len(routing.counts) <= FEW_EXPERTS, linears
    ends = routing.ends.cpu() if few else routing.ends  # the one wait for the device, for all products
    rows = moe_dispatch(hidden, routing.slots, routing.order)
    inner = F.silu(_project(rows, gate, ends)) * _project(rows, up, ends)
    return moe_combine(_project(inner, down, ends), routing.slots, routing.order, routing.weights)


def _by_expert(hidden: Tensor, routing: Routing, linears: tuple[ExpertLinear, ...]) -> Tensor:
    """moe_cpu.py's, in the types of `grouped_linear`; what dropout lets through is drawn here.

    Experts that are tensors of their own come in GROUPS, each an op, so that a backward adds the gradients of one group to what
    their parameters have, and is rid of them, before it makes the next's.
    """
    adapted = [linear.lora_A is not None and linear.lora_B is not None for linear in linears]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    base: list[Any] = [linear.weight for linear in linears]
    lora: list[Any] = [part for linear, has in zip(linears, adapted, strict=True) if has for part in (linear.lora_A, linear.lora_B)]
    shares = [linear.dropout if has else 0.0 for linear, has in zip(linears, adapted, strict=True)]
    masks = [
        torch.empty(len(routing.order), linear.weight[0].shape[1], dtype=torch.bool).bernoulli_(1 - share)
        for linear, share in zip(linears, shares, strict=True)
        if share
    ]
    num_experts, stacked = len(routing.counts), all(isinstance(part, Tensor) for part in (*base, *lora))
    size = num_experts if stacked or torch.compiler.is_compiling() else -(-num_experts // GROUPS)
    tokens, options = hidden.to(dtype or linears[0].weight[0].dtype), (adapted, [float(linear.scale) for linear in linears], shares)

    def output(first: int) -> Tensor:
        """The part of a group's experts."""
        count = min(size, num_experts - first)
        given = [parts if stacked else [each for part in parts for each in part[first : first + count]] for parts in (base, lora)]
        tensors = [[part.to(dtype or part.dtype) for part in parts] for parts in given]
        learning = any(tensor.requires_grad for tensor in (tokens, routing.weights, *tensors[0], *tensors[1]))
        kept = kept_rows(routing.order, routing.ends, first, count, tokens.dtype) if learning and torch.is_grad_enabled() else 0
        return moe_mlp_cpu(tokens, routing.weights, routing.order, routing.ends, *tensors, masks, *options, first, kept)[0]

    total = output(0)
    for first in range(size, num_experts, size):
        total = total + output(first)
    return total


def moe_mlp(hidden: Tensor, routing: Routing, gate_proj: Projection, up_proj: Projection, down_proj: Projection) -> Tensor:
    """The weighted sum of the SwiGLU experts each token of `hidden` (S, H) is routed to: (S, H), 0 for padding and what is dropped.

    gate_proj and up_proj go from H to I, down_proj from I to H, each of E experts as the routing has. Differentiable in hidden, the
    routing's weights and the projections. Raises ValueError.
    """
    num_experts, shape = len(routing.counts), tuple(routing.slots.shape)
    if hidden.dim() != 2 or len(hidden) != shape[0]:
        raise ValueError(f"hidden must be ({shape[0]}, H) as it was routed, not {tuple(hidden.shape)}")
    gate, up, down = (_linear(projection) for projection in (gate_proj, up_proj, down_proj))
    for name, linear in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
        if len(linear.weight) != num_experts:
            raise ValueError(f"{name} must be of {num_experts} experts as the routing is, not of {len(linear.weight)}")
    way = _by_expert if hidden.device.type == "cpu" else _in_rows
    return way(hidden, routing, (gate, up, down)).to(hidden.dtype)
