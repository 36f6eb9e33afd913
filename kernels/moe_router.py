"""The router of a mixture of experts: which experts each token goes to, with what weights, in which row of the dispatched order.

    l = x W^T (float32)    p = softmax(l)    e_1 .. e_K the largest of p, the first of equals    kept: its expert has room for it
    w_k = p_k, or p_k / sum_kept p           balance = E sum_e mean_s(p_e) f_e                  z = mean_s(logsumexp(l)^2)
    dp_k = kept (dw_k - sum_j dw_j w_j) / sum_kept p (renormalised) or kept dw_k,  dp_e += dbalance E f_e / n
    dl = p (dp - sum_e p dp) + dz 2 logsumexp(l) p / n        dx = dl W        dW = dl^T x

S tokens, n of them routed (padding is not), H hidden, E experts, K choices of a token, f_e the share of choices (of first choices
with `gshard`) that fell on expert e before drops. The specification, and what a Routing holds, is in moe_routing.py.

Two launches forward: the first takes a chunk of tokens a program, reads x once (2 S H bytes in bf16) and leaves each chunk's
counts; the second adds up the counts of the chunks before its own and places its tokens, without a sort, atomics or [S, E, C]. Two
backward: dl from the logits that were kept (4 S E bytes); then all tokens for a block of columns of x a program, which reads x and
writes dx once (where the states are float32 and E > 128 dx is a GEMM). The same bits each time. DeepSpeed's gating
(arXiv:2201.05596) builds [S, E, C] masks; triton_kernels' routing takes four launches and has no backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from kernels.language import tl, triton
from kernels.launch import LaunchConfig, launch, padded_power, runs_triton
from kernels.moe_routing import EPS, Routing, expert_capacity, place, route_eager, weigh

MOST_EXPERTS, MOST_CHOICES = 256, 16
LOWEST = tl.constexpr(-3.4028234663852886e38)
PROGRAMS = 256  # chunks of tokens, whose counts every program of the second launch adds up
GATE_TOKENS = 32  # of a tile; fewer than 64 keeps the three terms of a float32 product in mma.sync on Blackwell


@triton.jit
def _softmax(logits, column, E):
    # p and logsumexp of a tile [TOKENS, EP] whose columns past E are padding
    z = tl.where((column < E)[None, :], logits, float("-inf"))
    top = tl.max(z, 1)
    e = tl.exp(z - top[:, None])
    total = tl.sum(e, 1)
    return e / total[:, None], top + tl.log(total)


@triton.jit
def _gate_kernel(
    hidden, gate_weight, mask, logits, experts, probs, counts, gate_sums, z_sums, S, H, E, chunk,
    GATE: tl.constexpr, CHOICES: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, CP: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One chunk of tokens. Counts are [programs, CHOICES, E]: of all choices, or of each. Without GATE `hidden` are the logits
    program = tl.program_id(0)
    column, choice = tl.arange(0, EP), tl.arange(0, CP)[:, None]
    count = tl.zeros([CP, EP], tl.int32)
    gate_sum = tl.zeros([EP], tl.float32)
    z_sum = tl.zeros([TOKENS], tl.float32)
    for start in range(program * chunk, tl.minimum((program + 1) * chunk, S), TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < S
        routed = inside
        if mask is not None:
            routed = inside & (tl.load(mask + token, mask=inside, other=0) != 0)
        token = token.to(tl.int64)
        here = logits + token[:, None] * E + column[None, :]
        valid = inside[:, None] & (column < E)[None, :]
        if GATE:
            z = tl.zeros([TOKENS, EP], tl.float32)
            for first in range(0, H, BLOCK):
                h = first + tl.arange(0, BLOCK)
                x = tl.load(hidden + token[:, None] * H + h[None, :], mask=inside[:, None] & (h < H)[None, :], other=0.0)
                w = tl.load(
                    gate_weight + column[None, :] * H + h[:, None], mask=(column < E)[None, :] & (h < H)[:, None], other=0.0
                )
                z = tl.dot(x.to(tl.float32), w.to(tl.float32), z, input_precision="tf32x3")
        else:
            z = tl.load(hidden + token[:, None] * E + column[None, :], mask=valid, other=0.0).to(tl.float32)
        tl.store(here, z, mask=valid)
        p, lse = _softmax(z, column, E)
        gate_sum += tl.sum(tl.where(routed[:, None], p, 0.0), 0)
        z_sum += tl.where(routed, lse * lse, 0.0)
        rest = tl.where(z > LOWEST, z, LOWEST)  # NaN and -inf too
        rest = tl.where((column < E)[None, :], rest, float("-inf"))
        for k in range(K):
            best = tl.max(rest, 1)
            expert = tl.min(tl.where(rest == best[:, None], column[None, :], EP), 1)
            hit = column[None, :] == expert[:, None]
            tl.store(experts + token * K + k, tl.where(routed, expert, -1), mask=inside)
            prob = tl.sum(tl.where(hit, p, 0.0), 1)
            tl.store(probs + token * K + k, tl.where(routed, prob, 0.0), mask=inside)
            tally = tl.sum((hit & routed[:, None]).to(tl.int32), 0)
            count += tl.where(choice == (k if CHOICES > 1 else 0), tally[None, :], 0)
            rest = tl.where(hit, float("-inf"), rest)
    tl.store(counts + (program * CHOICES + choice) * E + column[None, :], count, mask=(choice < CHOICES) & (column < E)[None, :])
    tl.store(gate_sums + program * E + column, gate_sum, mask=column < E)
    tl.store(z_sums + program, tl.sum(z_sum, 0))


@triton.jit
def _place_kernel(
    experts, probs, counts, gate_sums, z_sums, weights, slots, order, totals, leading, ends, balance, z, S, E, chunk,
    programs, capacity, eps, RENORMALIZE: tl.constexpr, CHOICES: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr,
    CP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # The same chunk: base[c, e] is where choices c of expert e begin in it, counted from the expert's first row
    program = tl.program_id(0)
    column, choice, row = tl.arange(0, EP), tl.arange(0, CP)[:, None], tl.arange(0, ROWS)
    base = tl.zeros([CP, EP], tl.int32)
    total = tl.zeros([EP], tl.int32)
    first_choices = tl.zeros([EP], tl.int32)
    for c in tl.static_range(CHOICES):
        here = tl.zeros([EP], tl.int32)
        before = tl.zeros([EP], tl.int32)
        for first in range(0, programs, ROWS):
            r = first + row
            valid = (r < programs)[:, None] & (column < E)[None, :]
            n = tl.load(counts + (r * CHOICES + c)[:, None] * E + column[None, :], mask=valid, other=0)
            here += tl.sum(n, 0)
            before += tl.sum(tl.where((r < program)[:, None], n, 0), 0)
        base += tl.where(choice == c, (total + before)[None, :], 0)
        total += here
        if c == 0:
            first_choices = here
    kept = tl.minimum(total, capacity)
    end = tl.cumsum(kept, 0)
    last = tl.sum(kept, 0)
    if program == 0:
        gates = tl.zeros([EP], tl.float32)
        z_sum = tl.zeros([ROWS], tl.float32)
        for first in range(0, programs, ROWS):
            r = first + row
            valid = (r < programs)[:, None] & (column < E)[None, :]
            gates += tl.sum(tl.load(gate_sums + r[:, None] * E + column[None, :], mask=valid, other=0.0), 0)
            z_sum += tl.load(z_sums + r, mask=r < programs, other=0.0)
        n = tl.maximum(tl.sum(first_choices, 0) // (K if CHOICES == 1 else 1), 1).to(tl.float32)
        share = first_choices.to(tl.float32) / (n * (K if CHOICES == 1 else 1))
        tl.store(balance, E * tl.sum(gates / n * share, 0))
        tl.store(z, tl.sum(z_sum, 0) / n)
        tl.store(totals + column, total, mask=column < E)
        tl.store(leading + column, first_choices, mask=column < E)
        tl.store(ends + column, end, mask=column < E)
    k_column = tl.arange(0, KP)[None, :]
    for start in range(program * chunk, tl.minimum((program + 1) * chunk, S), TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < S
        token = token.to(tl.int64)
        slot = tl.full([TOKENS, KP], -1, tl.int32)
        for c in tl.static_range(CHOICES):
            chosen = tl.zeros([TOKENS, EP], tl.int32)
            for k in tl.static_range(K):
                if CHOICES == 1 or k == c:
                    expert = tl.load(experts + token * K + k, mask=inside, other=-1)
                    chosen += (column[None, :] == expert[:, None]).to(tl.int32)
            begin = tl.sum(tl.where(choice == c, base, 0), 0)
            position = begin[None, :] + tl.cumsum(chosen, 0) - chosen
            for k in tl.static_range(K):
                if CHOICES == 1 or k == c:
                    expert = tl.load(experts + token * K + k, mask=inside, other=-1)
                    hit = (column[None, :] == expert[:, None]) & (position < capacity)
                    place = tl.sum(tl.where(hit, position + (end - kept)[None, :] + 1, 0), 1) - 1
                    slot = tl.where(k_column == k, place[:, None], slot)
            base += tl.where(choice == c, tl.sum(chosen, 0)[None, :], 0)
        mine = token[:, None] * K + k_column
        valid = inside[:, None] & (k_column < K)
        weight = tl.load(probs + mine, mask=valid, other=0.0)
        weight = tl.where(slot >= 0, weight, 0.0)
        if RENORMALIZE:
            weight = weight / tl.maximum(tl.sum(weight, 1), eps)[:, None]
        tl.store(weights + mine, weight, mask=valid)
        tl.store(slots + mine, slot, mask=valid)
        tl.store(order + slot, mine.to(tl.int32), mask=valid & (slot >= 0))
        tl.store(order + mine, tl.full([TOKENS, KP], -1, tl.int32), mask=valid & (mine >= last))


@triton.jit
def _logit_gradient_kernel(
    grad_weights, grad_balance, grad_z, logits, experts, slots, leading, grad_logits, S, E, eps,
    RENORMALIZE: tl.constexpr, CHOICES: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    # dl of a tile of tokens
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < S
    token = token.to(tl.int64)
    column = tl.arange(0, EP)
    offsets = token[:, None] * E + column[None, :]
    valid = inside[:, None] & (column < E)[None, :]
    p, lse = _softmax(tl.load(logits + offsets, mask=valid, other=0.0), column, E)
    lead = tl.load(leading + column, mask=column < E, other=0).to(tl.float32)
    n = tl.maximum(tl.sum(lead, 0) / CHOICES, 1.0)
    divisor = tl.zeros([TOKENS], tl.float32) + 1.0
    mean = tl.zeros([TOKENS], tl.float32)  # sum_j dw_j w_j
    if RENORMALIZE:
        total = tl.zeros([TOKENS], tl.float32)
        for k in range(K):
            expert = tl.load(experts + token * K + k, mask=inside, other=-1)
            kept = tl.load(slots + token * K + k, mask=inside, other=-1) >= 0
            prob = tl.sum(tl.where((column[None, :] == expert[:, None]) & kept[:, None], p, 0.0), 1)
            total += prob
            mean += prob * tl.load(grad_weights + token * K + k, mask=inside, other=0.0)
        divisor = tl.maximum(total, eps)
        mean = tl.where(total > eps, mean / divisor, 0.0)
    dp = tl.zeros([TOKENS, EP], tl.float32) + (tl.load(grad_balance) * E / (n * n * CHOICES) * lead)[None, :]
    for k in range(K):
        expert = tl.load(experts + token * K + k, mask=inside, other=-1)
        kept = tl.load(slots + token * K + k, mask=inside, other=-1) >= 0
        dw = (tl.load(grad_weights + token * K + k, mask=inside, other=0.0) - mean) / divisor
        dp += tl.where((column[None, :] == expert[:, None]) & kept[:, None], dw[:, None], 0.0)
    dl = p * (dp - tl.sum(p * dp, 1)[:, None] + (tl.load(grad_z) * 2.0 / n * lse)[:, None])
    routed = tl.load(experts + token * K, mask=inside, other=-1) >= 0
    tl.store(grad_logits + offsets, tl.where(routed[:, None], dl, 0.0), mask=valid)


@triton.jit
def _gate_gradient_kernel(
    hidden, gate_weight, grad_logits, grad_hidden, grad_gate, S, H, E, EP: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    # A block of columns of x, all tokens: dx = dl W, and dW^T = x^T dl in registers
    column, h = tl.arange(0, EP), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    w = tl.load(gate_weight + column[:, None] * H + h[None, :], mask=(column < E)[:, None] & (h < H)[None, :], other=0.0)
    w = w.to(tl.float32)
    dw = tl.zeros([COLUMNS, EP], tl.float32)
    for start in range(0, S, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        dl = tl.load(grad_logits + token * E + column[None, :], mask=(token < S) & (column < E)[None, :], other=0.0)
        x = tl.load(hidden + token * H + h[None, :], mask=(token < S) & (h < H)[None, :], other=0.0).to(tl.float32)
        if grad_hidden is not None:
            if grad_hidden.dtype.element_ty.primitive_bitwidth == 16:
                dx = tl.dot(dl, w, input_precision="tf32")  # its rounding is finer than that of the result
            else:
                dx = tl.dot(dl, w, input_precision="tf32x3")
            tl.store(grad_hidden + token * H + h[None, :], dx.to(grad_hidden.dtype.element_ty), mask=(token < S) & (h < H)[None, :])
        dw = tl.dot(tl.trans(x), dl, dw, input_precision="tf32x3")
    offsets = column[None, :] * H + h[:, None]
    tl.store(grad_gate + offsets, dw.to(grad_gate.dtype.element_ty), mask=(column < E)[None, :] & (h < H)[:, None])


def _sizes(E: int, K: int, gshard: bool) -> dict[str, Any]:
    CHOICES = K if gshard else 1
    return {"CHOICES": CHOICES, "K": K, "EP": padded_power(max(E, 16)), "CP": padded_power(CHOICES)}


def _gate_constants(E: int, K: int, gshard: bool, gate: bool) -> dict[str, Any]:
    """More columns of x at a time spill: the three terms of a product hold both factors twice in registers."""
    tokens, block = GATE_TOKENS if E <= 128 else 16, 64 if E <= 16 else 32 if E <= 128 else 16
    launched = {"num_warps": 4} if E <= 32 else {"num_warps": 8, "maxnreg": 224}  # left alone ptxas keeps to 128, and spills
    return _sizes(E, K, gshard) | {"GATE": gate, "TOKENS": tokens, "BLOCK": block, "num_stages": 3} | launched


def _place_constants(E: int, K: int, gshard: bool, renormalize: bool) -> dict[str, Any]:
    sizes = _sizes(E, K, gshard)
    rows = max(4096 // sizes["EP"], 16)
    return sizes | {"RENORMALIZE": renormalize, "KP": padded_power(K), "TOKENS": 16, "ROWS": rows, "num_warps": 4}


def _logit_constants(E: int, K: int, gshard: bool, renormalize: bool) -> dict[str, Any]:
    """`CHOICES` is here the choices of a token that the balance loss counts. Left alone ptxas keeps to 64 registers on sm_100."""
    sizes = {"K": K, "EP": padded_power(max(E, 16)), "CHOICES": 1 if gshard else K}
    return sizes | {"RENORMALIZE": renormalize, "TOKENS": 16, "num_warps": 4 if E <= 128 else 8, "maxnreg": 192}


def _gradient_constants(E: int) -> dict[str, Any]:
    sizes = {"EP": padded_power(max(E, 16)), "TOKENS": 32 if E <= 64 else 16, "COLUMNS": 32}
    return sizes | {"num_warps": 4 if E <= 64 else 8, "num_stages": 3 if E <= 64 else 2}


def _fits(E: int, hidden: Tensor) -> bool:
    """Whether dx is computed beside dW: for float32 and more experts the kernel would spill."""
    return E <= 128 or hidden.dtype.itemsize == 2


def launch_configs() -> Iterator[LaunchConfig]:
    """4096 wide: two experts as MedPLIB has, 8, 64 and 256; by hidden states and by logits."""
    x, w, i = (torch.empty(0, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32, torch.int32))
    mask, S, H, chunk = torch.empty(0, dtype=torch.uint8, device="meta"), 8192, 4096, 32
    for E, K, gshard in ((2, 1, False), (4, 2, True), (8, 2, False), (64, 8, False), (128, 8, False), (256, 8, False)):
        name, renormalize = f"E={E}, K={K}{', gshard' * gshard}", K > 1
        outputs = (w, i, w, i, w, w)
        constants = _gate_constants(E, K, gshard, True)
        yield LaunchConfig(f"moe gate, {name}", _gate_kernel, (x, w, mask, *outputs, S, H, E, chunk), constants)
        constants = _gate_constants(E, K, gshard, False)
        yield LaunchConfig(f"moe choice, {name}", _gate_kernel, (w, None, None, *outputs, S, E, E, chunk), constants)
        placed = (i, w, i, w, w, w, i, i, i, i, i, w, w)
        constants = _place_constants(E, K, gshard, renormalize)
        yield LaunchConfig(f"moe place, {name}", _place_kernel, (*placed, S, E, chunk, 256, S, EPS), constants)
        tensors = (w, w, w, w, i, i, i, w)
        constants = _logit_constants(E, K, gshard, renormalize)
        yield LaunchConfig(f"moe logits, backward, {name}", _logit_gradient_kernel, (*tensors, S, E, EPS), constants)
        for kind, states in {"": x, ", fp32": w}.items():
            operands = (states, w, w, states if _fits(E, states) else None, w)
            yield LaunchConfig(
                f"moe gate, backward, {name}{kind}", _gate_gradient_kernel, (*operands, S, H, E), _gradient_constants(E)
            )


@custom_op("vesalius::moe_route", mutates_args=())
def moe_route_forward(
    hidden: Tensor,
    gate_weight: Tensor | None,
    mask: Tensor | None,
    priority: Tensor | None,
    top_k: int,
    capacity: int,
    renormalize: bool,
    by_probability: bool,
    gshard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of a Routing, and the counts of the balance loss; `hidden` are the logits where there is no `gate_weight`."""
    S, E, K = len(hidden), hidden.shape[1] if gate_weight is None else len(gate_weight), top_k
    if not runs_triton(hidden) or not S:
        by = "probability" if by_probability else priority
        routing, leading = route_eager(hidden, gate_weight, mask, by, top_k, capacity, renormalize, gshard)
        return *routing, leading
    chunk = triton.cdiv(S, PROGRAMS * GATE_TOKENS) * GATE_TOKENS
    programs = triton.cdiv(S, chunk)
    constants = _gate_constants(E, K, gshard, gate_weight is not None)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    experts, slots, order, ends, totals, leading = empty(S, K), empty(S, K), empty(S * K), empty(E), empty(E), empty(E)
    logits, weights, probs, balance, z = (empty(*shape, dtype=torch.float32) for shape in ((S, E), (S, K), (S, K), (), ()))
    counts, sums = empty(programs, constants["CHOICES"], E), empty(programs, E + 1, dtype=torch.float32)
    gate_sums, z_sums = sums.view(-1)[: programs * E], sums.view(-1)[programs * E :]
    given = (hidden.contiguous(), None if gate_weight is None else gate_weight.contiguous())
    flags = None if mask is None else mask.bool().contiguous().view(torch.uint8)
    sizes = (S, hidden.shape[1], E, chunk)
    launch(_gate_kernel, (programs,), *given, flags, logits, experts, probs, counts, gate_sums, z_sums, *sizes, **constants)
    placed = (experts, probs, counts, gate_sums, z_sums, weights, slots, order, totals, leading, ends, balance, z)
    constants = _place_constants(E, K, gshard, renormalize)
    launch(_place_kernel, (programs,), *placed, S, E, chunk, programs, capacity, EPS, **constants)
    if (priority is not None or by_probability) and capacity < S:  # who stays is then asked of every expert by torch.topk
        slots, order, totals, ends = place(experts, E, capacity, logits.softmax(-1) if by_probability else priority, gshard)
        weights = weigh(probs, slots, renormalize)
    return weights, experts, slots, order, totals, ends, balance, z, logits, leading


@moe_route_forward.register_fake
def _(hidden, gate_weight, mask, priority, top_k, capacity, renormalize, by_probability, gshard):
    S, E = len(hidden), hidden.shape[1] if gate_weight is None else len(gate_weight)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    integers = [hidden.new_empty(shape, dtype=torch.int32) for shape in ((S, top_k), (S, top_k), (S * top_k,), (E,), (E,), (E,))]
    weights, balance, z, logits = (hidden.new_empty(shape, dtype=dtype) for shape in ((S, top_k), (), (), (S, E)))
    return weights, *integers[:5], balance, z, logits, integers[5]


@custom_op("vesalius::moe_route_backward", mutates_args=())
def moe_route_backward(
    grad_weights: Tensor,
    grad_balance: Tensor,
    grad_z: Tensor,
    hidden: Tensor,
    gate_weight: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    slots: Tensor,
    leading: Tensor,
    renormalize: bool,
    gshard: bool,
    need_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dgate_weight), empty where not needed; (dlogits, empty) where there is no `gate_weight`."""
    (S, E), K = logits.shape, experts.shape[1]
    on_triton = runs_triton(hidden) and S > 0
    if on_triton:
        grad_logits, constants = torch.empty_like(logits), _logit_constants(E, K, gshard, renormalize)
        tensors = (grad_weights.contiguous(), grad_balance, grad_z, logits, experts, slots, leading, grad_logits)
        launch(_logit_gradient_kernel, (triton.cdiv(S, constants["TOKENS"]),), *tensors, S, E, EPS, **constants)
    else:
        grad_logits = _logit_gradient(grad_weights, grad_balance, grad_z, logits, experts, slots, leading, renormalize, gshard)
    if gate_weight is None:
        return grad_logits.to(hidden.dtype), logits.new_empty(0)
    fused = on_triton and _fits(E, hidden)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if fused and need_hidden else hidden.new_empty(0)
    if on_triton:
        grad_gate, constants = torch.empty_like(gate_weight, memory_format=torch.contiguous_format), _gradient_constants(E)
        operands = (
            hidden.contiguous(),
            gate_weight.contiguous(),
            grad_logits,
            grad_hidden if fused and need_hidden else None,
            grad_gate,
        )
        grid = (triton.cdiv(hidden.shape[1], constants["COLUMNS"]),)
        launch(_gate_gradient_kernel, grid, *operands, S, hidden.shape[1], E, **constants)
    with torch.autocast(hidden.device.type, enabled=False):
        if not on_triton:
            grad_gate = (grad_logits.T @ hidden.to(grad_logits.dtype)).to(gate_weight.dtype)
        if need_hidden and not fused:
            grad_hidden = (grad_logits @ gate_weight.to(grad_logits.dtype)).to(hidden.dtype)
    return grad_hidden, grad_gate


def _logit_gradient(grad_weights, grad_balance, grad_z, logits, experts, slots, leading, renormalize, gshard):
    (S, E), choices = logits.shape, 1 if gshard else experts.shape[1]
    p, kept, index = logits.softmax(-1), slots >= 0, experts.clamp(min=0).long()
    n = (leading.sum() / choices).clamp(min=1).to(p.dtype)
    dw = grad_weights
    if renormalize:
        chosen = p.gather(1, index).where(kept, 0.0)
        total = chosen.sum(-1, keepdim=True)
        divisor = total.clamp(min=EPS)
        dw = (dw - ((dw * chosen).sum(-1, keepdim=True) / divisor).where(total > EPS, 0.0)) / divisor
    dp = (grad_balance * E / (n * n * choices) * leading).expand(S, E).scatter_add(1, index, dw.where(kept, 0.0))
    lse = logits.logsumexp(-1, keepdim=True)
    dl = p * (dp - (p * dp).sum(-1, keepdim=True) + grad_z * 2 / n * lse)
    return dl.where(experts[:, :1] >= 0, 0.0)


@moe_route_backward.register_fake
def _(grad_weights, grad_balance, grad_z, hidden, gate_weight, logits, experts, slots, leading, renormalize, gshard, need_hidden):
    if gate_weight is None:
        return torch.empty_like(hidden, memory_format=torch.contiguous_format), logits.new_empty(0)
    return hidden.new_empty(hidden.shape if need_hidden else 0), gate_weight.new_empty(gate_weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, gate_weight, *_, ctx.renormalize, _, ctx.gshard = inputs
    _, experts, slots, order, counts, ends, _, _, logits, leading = output
    ctx.mark_non_differentiable(experts, slots, order, counts, ends, logits, leading)
    ctx.save_for_backward(hidden, gate_weight, logits, experts, slots, leading)


def _backward(ctx: Any, grad_weights: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_balance, grad_z = grads[5:7]
    need_hidden, need_gate = ctx.needs_input_grad[:2]
    rest = (*ctx.saved_tensors, ctx.renormalize, ctx.gshard, need_hidden)
    grad_hidden, grad_gate = moe_route_backward(grad_weights, grad_balance, grad_z, *rest)
    return grad_hidden if need_hidden else None, grad_gate if need_gate else None, *[None] * 7


moe_route_forward.register_autograd(_backward, setup_context=_setup)


def route(
    hidden: Tensor,
    gate_weight: Tensor | None,
    top_k: int,
    *,
    mask: Tensor | None = None,
    renormalize: bool | None = None,
    capacity_factor: float | None = None,
    min_capacity: int = 0,
    priority: Tensor | str | None = None,
    gshard: bool = False,
) -> Routing:
    """Where the tokens `hidden` (S, H) go under softmax(hidden gate_weight^T); gate_weight (E, H), E of 2 to 256, top_k of 1 to 16.

    Without `gate_weight`, `hidden` are the logits (S, E). `mask` (S,): 0 where a token is padding. `renormalize`: weights sum to 1
    over the kept choices (by default where top_k > 1). `capacity_factor`: an expert has max(ceil(S K / E factor), min_capacity)
    rows, and drops of more tokens the latest, or those of the lowest `priority`: "probability" or a tensor (S, E). By default none
    are dropped. `gshard`: first choices are placed before second ones, and they alone count in the balance loss (arXiv:2006.16668,
    DeepSpeed's top2gating). Differentiable in hidden and gate_weight through weights and both losses. Raises ValueError.
    """
    E, K = hidden.shape[-1] if gate_weight is None else len(gate_weight), top_k
    if hidden.dim() != 2 or (gate_weight is not None and (gate_weight.dim() != 2 or gate_weight.shape[1] != hidden.shape[1])):
        shapes = [tuple(tensor.shape) for tensor in (hidden, gate_weight) if tensor is not None]
        raise ValueError(f"hidden and gate_weight must be (S, H) and (E, H), not {' and '.join(map(str, shapes))}")
    if not 2 <= E <= MOST_EXPERTS or not 1 <= K <= min(E, MOST_CHOICES):
        raise ValueError(f"experts must be 2 to {MOST_EXPERTS} and top_k 1 to {MOST_CHOICES} of them, not {E} and {K}")
    if mask is not None and mask.shape != hidden.shape[:1]:
        raise ValueError(f"mask must be {tuple(hidden.shape[:1])}, not {tuple(mask.shape)}")
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(f"capacity_factor must be positive, not {capacity_factor}")
    if isinstance(priority, str) and priority != "probability":
        raise ValueError(f"priority must be 'probability' or a tensor, not {priority!r}")
    scores = None if isinstance(priority, str) else priority
    if scores is not None and scores.shape != (len(hidden), E):
        raise ValueError(f"priority must be {(len(hidden), E)}, not {tuple(scores.shape)}")
    capacity = expert_capacity(len(hidden), E, K, capacity_factor, min_capacity)
    renormalize = K > 1 if renormalize is None else renormalize
    flags = (K, capacity, renormalize, isinstance(priority, str), gshard)
    return Routing(*moe_route_forward(hidden, gate_weight, mask, scores, *flags)[:9])
