"""Attention over rows `[prompt | answer_1 | ... | answer_G]`, in which an answer sees the prompt and itself, never another answer.

    s_ij = scale q_i . k_j   over j <= i with j >= start and (j < P or j >= P + T floor((i - P) / T))
    l_i = log sum_j exp(s_ij)     p_ij = exp(s_ij - l_i)     o_i = sum_j p_ij v_j
    delta_i = do_i . o_i     ds_ij = scale p_ij (do_i . v_j - delta_i)
    dq_i = sum_j ds_ij k_j     dk_j = sum_i ds_ij q_i     dv_j = sum_i p_ij do_i        sums over i: every answer, every query head

B prompts, G answers of T tokens, S = P + G T tokens a row, of which the first `start` are left padding (their o is 0 and nothing
sees them); h query heads, k key heads, each for h / k query heads; d head size. Rotary positions are in q and k.

The prompt's keys and values are read where they lie: none is repeated for an answer or a query head, nothing is concatenated, and
the answers' gradients of the prompt are summed in registers. Tiles of rows go over answers' ends, so short answers share one. Kept
for the backward: q, k, v, o (which the output projection keeps anyway) and l, 2 (h + k) d elements and 4 h bytes a token. FLOPs are
4 d for each head and pair that sees the other, and 14 d in the backward, whose two kernels both compute p and do v^T; there are
P^2 / 2 such pairs in a prompt and G T (P + T / 2) in its answers. Improves on G separate rows, and on rows that repeat the prompt's
keys for every answer.

The op is opaque to torch.compile: there is nothing to fuse with it. Its Triton kernels compile and run alone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from kernels.language import tl, triton
from kernels.launch import LARGE_SHARED, SMALL_SHARED, LaunchConfig, launch, padded_power, runs_triton, shared_bytes
from kernels.prefix_attention_eager import attend_by_parts, gradients_by_parts

LOG2E = tl.constexpr(1.4426950408889634)
PROGRAMS = 256  # aimed at by the gradient of keys: two a multiprocessor
LARGEST_HEAD = 128


def prefix_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_length: int,
    num_answers: int,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The specification of `prefix_attention`, differentiable by autograd in any floating dtype."""
    (_, h, S, d), P = query.shape, prompt_length
    key, value = (x.repeat_interleave(h // x.shape[1], 1) for x in (key, value))
    seen = seen_keys(S, P, num_answers, query.device)
    if start is not None:
        seen = seen & (torch.arange(S, device=query.device) >= start[:, None, None, None])
    scores = (query @ key.mT) * (d**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen  # 0 where a query sees nothing
    return (weights @ value).transpose(1, 2)


def seen_keys(S: int, P: int, num_answers: int, device: torch.device) -> Tensor:
    """[S, S] bool: which tokens (columns) each token of a row without padding sees."""
    T = _answer_length(S, P, num_answers)
    i, j = torch.arange(S, device=device)[:, None], torch.arange(S, device=device)
    return (j <= i) & ((j < P) | (j >= P + (i - P).div(T, rounding_mode="floor") * T))


class Strides(NamedTuple):
    """Elements from one prompt, head and token to the next of a tensor [B, heads, S, d]; within a token they are neighbours."""

    prompt: Any
    head: Any
    token: Any


@triton.jit
def _load_rows(pointer, stride, rows, inside, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    # Rows of HEAD elements, 0 where not `inside` and beyond HEAD
    column = tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < HEAD)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, stride, rows, inside, x, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < HEAD)[None, :]
    tl.store(pointer + rows.to(tl.int64)[:, None] * stride + column[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _tile(index, S, P, SIZE: tl.constexpr):
    # First token of a tile, and the end of the tokens that it may hold: no tile has tokens of the prompt and of answers
    of_prompt = tl.cdiv(P, SIZE)
    first = tl.where(index < of_prompt, index * SIZE, P + (index - of_prompt) * SIZE)
    return first, tl.where(index < of_prompt, P, S)


@triton.jit
def _own(tokens, P, T):
    # First token of the answer that a token is part of; 0 in the prompt
    return tl.where(tokens < P, 0, P + (tokens - P) // T * T)


@triton.jit
def _attend_tile(
    a, top, total, y, k, v, k_stride, v_stride, rows, own, keys, first_key, end,
    scale, HEAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # One more tile of keys: those of first_key to `end` that a row may see
    inside = (keys >= first_key) & (keys < end)
    kk = _load_rows(k, k_stride, keys, inside, HEAD, WIDTH)
    s = tl.dot(a, tl.trans(kk), input_precision="tf32x3") * scale
    seen = inside[None, :] & (keys[None, :] <= rows[:, None]) & (keys[None, :] >= own[:, None])
    s = tl.where(seen, s, float("-inf"))
    larger = tl.maximum(top, tl.max(s, 1))
    base = tl.where(larger == float("-inf"), 0.0, larger)  # a row that has seen nothing yet
    w = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    vv = _load_rows(v, v_stride, keys, inside, HEAD, WIDTH)
    total = total * shrink + tl.sum(w, 1)
    y = y * shrink[:, None] + tl.dot(w.to(vv.dtype), vv, input_precision="tf32x3")
    return larger, total, y


@triton.jit
def _attention_kernel(
    query, key, value, output, lse, starts, q_strides, k_strides, v_strides, S, P, T, scale, share,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # ROWS tokens of one query head: over the prompt's keys, then over those of their own answers. The longest programs come first
    first, last = _tile(tl.num_programs(0) - 1 - tl.program_id(0), S, P, ROWS)
    head, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    q = query + b * q_strides.prompt + head * q_strides.head
    k = key + b * k_strides.prompt + head // share * k_strides.head
    v = value + b * v_strides.prompt + head // share * v_strides.head
    start = tl.load(starts + b).to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    inside, own = rows < last, _own(rows, P, T)
    a = _load_rows(q, q_strides.token, rows, inside, HEAD, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    nothing = tl.zeros([ROWS], tl.int32)
    end = tl.minimum(P, first + ROWS)
    for begin in tl.range(start // KEYS * KEYS, end, KEYS, num_stages=STAGES):
        keys = begin + tl.arange(0, KEYS)
        top, total, y = _attend_tile(
            a, top, total, y, k, v, k_strides.token, v_strides.token, rows, nothing, keys, start, end, scale, HEAD, WIDTH
        )
    end = tl.where(first < P, 0, tl.minimum(S, first + ROWS))
    for begin in tl.range(tl.where(first < P, 0, P + (first - P) // T * T), end, KEYS, num_stages=STAGES):
        keys = begin + tl.arange(0, KEYS)
        top, total, y = _attend_tile(
            a, top, total, y, k, v, k_strides.token, v_strides.token, rows, own, keys, P, end, scale, HEAD, WIDTH
        )
    blind = total == 0.0
    y = y / tl.where(blind, 1.0, total)[:, None]
    _store_rows(output + (b * S * heads + head) * HEAD, heads * HEAD, rows, inside, y, HEAD, WIDTH)
    sums = tl.where(blind, float("inf"), (top + tl.log2(tl.where(blind, 1.0, total))) / LOG2E)
    tl.store(lse + (b * heads + head) * S + rows, sums, mask=inside)


@triton.jit
def _gradient_tile(
    a, dy, top, delta, dq, k, v, k_stride, v_stride, rows, own, keys, first_key, end,
    scale, HEAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    inside = (keys >= first_key) & (keys < end)
    kk = _load_rows(k, k_stride, keys, inside, HEAD, WIDTH)
    s = tl.dot(a, tl.trans(kk), input_precision="tf32x3") * scale - top[:, None]
    seen = inside[None, :] & (keys[None, :] <= rows[:, None]) & (keys[None, :] >= own[:, None])
    w = tl.where(seen, tl.exp2(s), 0.0)
    vv = _load_rows(v, v_stride, keys, inside, HEAD, WIDTH)
    dw = tl.dot(dy, tl.trans(vv), input_precision="tf32x3")
    ds = w * (dw - delta[:, None])
    return dq + tl.dot(ds.to(kk.dtype), kk, input_precision="tf32x3")


@triton.jit
def _query_gradient_kernel(
    query, key, value, output, grad, lse, deltas, grad_query, starts, q_strides, k_strides, v_strides, g_strides,
    S, P, T, scale, share,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # As the forward; leaves delta for the gradient of the keys
    first, last = _tile(tl.num_programs(0) - 1 - tl.program_id(0), S, P, ROWS)
    head, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    k = key + b * k_strides.prompt + head // share * k_strides.head
    v = value + b * v_strides.prompt + head // share * v_strides.head
    start = tl.load(starts + b).to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    inside, own = rows < last, _own(rows, P, T)
    a = _load_rows(query + b * q_strides.prompt + head * q_strides.head, q_strides.token, rows, inside, HEAD, WIDTH)
    dy = _load_rows(grad + b * g_strides.prompt + head * g_strides.head, g_strides.token, rows, inside, HEAD, WIDTH)
    y = _load_rows(output + (b * S * heads + head) * HEAD, heads * HEAD, rows, inside, HEAD, WIDTH)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    place = (b * heads + head) * S + rows
    tl.store(deltas + place, delta, mask=inside)
    top = tl.load(lse + place, mask=inside, other=float("inf")) * LOG2E
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    nothing = tl.zeros([ROWS], tl.int32)
    end = tl.minimum(P, first + ROWS)
    for begin in tl.range(start // KEYS * KEYS, end, KEYS, num_stages=STAGES):
        keys = begin + tl.arange(0, KEYS)
        dq = _gradient_tile(
            a, dy, top, delta, dq, k, v, k_strides.token, v_strides.token, rows, nothing, keys, start, end, scale, HEAD, WIDTH
        )
    end = tl.where(first < P, 0, tl.minimum(S, first + ROWS))
    for begin in tl.range(tl.where(first < P, 0, P + (first - P) // T * T), end, KEYS, num_stages=STAGES):
        keys = begin + tl.arange(0, KEYS)
        dq = _gradient_tile(
            a, dy, top, delta, dq, k, v, k_strides.token, v_strides.token, rows, own, keys, P, end, scale, HEAD, WIDTH
        )
    _store_rows(grad_query + (b * S * heads + head) * HEAD, heads * HEAD, rows, inside, dq * (scale / LOG2E), HEAD, WIDTH)


@triton.jit
def _key_gradient_kernel(
    query, key, value, grad, lse, deltas, grad_key, grad_value, starts, q_strides, k_strides, v_strides, g_strides,
    S, P, T, scale, share, splits,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # KEYS tokens of one key head: every row that sees them, of 1 / splits of the query heads that share them
    first, last = _tile(tl.program_id(0), S, P, KEYS)
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head, split, key_heads = part // splits, part % splits, tl.num_programs(1) // splits
    heads, each = key_heads * share, share // splits
    start = tl.load(starts + b).to(tl.int32)
    keys = first + tl.arange(0, KEYS)
    inside = keys < last
    kk = _load_rows(key + b * k_strides.prompt + key_head * k_strides.head, k_strides.token, keys, inside, HEAD, WIDTH)
    vv = _load_rows(value + b * v_strides.prompt + key_head * v_strides.head, v_strides.token, keys, inside, HEAD, WIDTH)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    final = tl.minimum(first + KEYS, last) - 1
    end = tl.where(first < P, S, tl.minimum(S, P + ((final - P) // T + 1) * T))  # an answer's keys: to its last row
    for member in range(0, each):
        head = key_head * share + split * each + member
        q = query + b * q_strides.prompt + head * q_strides.head
        g = grad + b * g_strides.prompt + head * g_strides.head
        place = (b * heads + head) * S
        for begin in tl.range(first, end, ROWS, num_stages=STAGES):
            rows = begin + tl.arange(0, ROWS)
            there = rows < end
            a = _load_rows(q, q_strides.token, rows, there, HEAD, WIDTH)
            top = tl.load(lse + place + rows, mask=there, other=float("inf")) * LOG2E
            s = tl.dot(kk, tl.trans(a), input_precision="tf32x3") * scale - top[None, :]
            seen = inside[:, None] & (keys >= start)[:, None] & (keys[:, None] <= rows[None, :])
            seen = seen & ((first < P) | (keys[:, None] >= _own(rows, P, T)[None, :]))
            w = tl.where(seen, tl.exp2(s), 0.0)
            dy = _load_rows(g, g_strides.token, rows, there, HEAD, WIDTH)
            dv += tl.dot(w.to(dy.dtype), dy, input_precision="tf32x3")
            dw = tl.dot(vv, tl.trans(dy), input_precision="tf32x3")
            delta = tl.load(deltas + place + rows, mask=there, other=0.0)
            ds = w * (dw - delta[None, :])
            dk += tl.dot(ds.to(a.dtype), a, input_precision="tf32x3")
    out = ((split * tl.num_programs(2) + b) * S * key_heads + key_head) * HEAD
    _store_rows(grad_key + out, key_heads * HEAD, keys, inside, dk * (scale / LOG2E), HEAD, WIDTH)
    _store_rows(grad_value + out, key_heads * HEAD, keys, inside, dv, HEAD, WIDTH)


def _constants(d: int, dtype: torch.dtype, shared: int, by_key: bool = False) -> dict[str, Any]:
    """Tiles that fit the registers, `by_key`: of the keys' gradient, which holds two sums; 32-bit products come as three.

    Heads of 80 or 96, whose columns are masked, have twice the warps and so half the registers of a tile. The next tile is on its
    way while one is worked on, where a program has room for both.
    """
    wide, whole = dtype.itemsize > 2, d == padded_power(d)
    rows, keys, warps = (16, 16, 8) if wide else (32, 64, 8) if by_key else (64, 64, 4 if whole else 8)
    stages = 1 if wide or shared <= 128 << 10 else 2
    return {"HEAD": d, "WIDTH": padded_power(d), "ROWS": rows, "KEYS": keys, "STAGES": stages, "num_warps": warps}


def launch_configs() -> Iterator[LaunchConfig]:
    """16 query and 2 key heads of 128 (Qwen2.5-VL 3B), those in fp32, and 32 of 80 with as many keys; P = 704, 8 answers of 256."""
    vector, ids = torch.empty(0, device="meta"), torch.empty(0, dtype=torch.int32, device="meta")
    for d, h, k, dtype in ((128, 16, 2, torch.bfloat16), (128, 16, 2, torch.float32), (80, 32, 32, torch.bfloat16)):
        x = torch.empty(0, dtype=dtype, device="meta")
        S, P, T = 704 + 8 * 256, 704, 256
        q, kv = Strides(S * h * d, d, h * d), Strides(S * k * d, d, k * d)
        sizes = (S, P, T, d**-0.5 * LOG2E.value, h // k)
        for end, shared, archs in (("", LARGE_SHARED, (80, 90, 100)), (", 99 KB", SMALL_SHARED, (89,))):
            by_row, by_key = _constants(d, dtype, shared), _constants(d, dtype, shared, by_key=True)
            name = f"{h} on {k} heads of {d}{', fp32' if dtype == torch.float32 else ''}{end}"
            arguments: tuple[Any, ...] = (x, x, x, x, vector, ids, q, kv, kv, *sizes)
            yield LaunchConfig(f"prefix attention, {name}", _attention_kernel, arguments, by_row, archs)
            arguments = (x, x, x, x, x, vector, vector, x, ids, q, kv, kv, q, *sizes)
            yield LaunchConfig(f"prefix queries' gradient, {name}", _query_gradient_kernel, arguments, by_row, archs)
            arguments = (x, x, x, x, vector, vector, x, x, ids, q, kv, kv, q, *sizes, 1)
            yield LaunchConfig(f"prefix keys' gradient, {name}", _key_gradient_kernel, arguments, by_key, archs)


def in_rows(*tensors: Tensor) -> list[Tensor]:
    """In the type of the last (rotation may have widened the others), or in autocast's where that is on; the last dimension
    contiguous, the others as they are."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return [_with_rows(tensor.to(dtype)) for tensor in tensors]


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or not x.numel() else x.contiguous()


def _tiles(S: int, P: int, size: int) -> int:
    """Of tokens: those of the prompt and those of its answers are in different ones."""
    return triton.cdiv(P, size) + triton.cdiv(S - P, size)


def _takes(query: Tensor) -> bool:
    """Whether the kernels run: heads of 16 to 128, which a tile of fits."""
    return runs_triton(query) and 16 <= query.shape[-1] <= LARGEST_HEAD


def strides_of(x: Tensor) -> Strides:
    """Of x [B, heads, S, d]."""
    return Strides(x.stride(0), x.stride(1), x.stride(2))


def _divisor(number: int, least: int) -> int:
    """The smallest divisor of `number` that is at least `least`, or `number` itself."""
    return next((divisor for divisor in range(1, number) if number % divisor == 0 and divisor >= least), number)


def _answer_length(S: int, P: int, G: int) -> int:
    """T; 1 where there is no answer, as it divides."""
    return max(1, (S - P) // max(1, G))


@custom_op("vesalius::prefix_attention", mutates_args=())
def prefix_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, prompt_length: int, num_answers: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o [B, S, h, d] and l [B, h, S], inf where a query sees nothing."""
    (B, h, S, d), P, G = query.shape, prompt_length, num_answers
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.numel() and _takes(query):
        output, lse = query.new_empty(B, S, h, d), query.new_empty(B, h, S, dtype=wide)
        constants = _constants(d, query.dtype, shared_bytes(query.device))
        grid = (_tiles(S, P, constants["ROWS"]), h, B)
        tensors = (query, key, value, output, lse, starts, strides_of(query), strides_of(key), strides_of(value))
        sizes = (S, P, _answer_length(S, P, G), scale * LOG2E.value, h // key.shape[1])
        launch(_attention_kernel, grid, *tensors, *sizes, **constants)
        return output, lse
    output, lse = query.new_zeros(B, S, h, d), query.new_full((B, h, S), float("inf"), dtype=wide)
    if query.numel():
        attend_by_parts(query, key, value, starts, P, G, scale, output, lse)
    return output, lse


@prefix_attention_forward.register_fake
def _(query, key, value, starts, prompt_length, num_answers, scale):
    B, h, S, d = query.shape
    return query.new_empty(B, S, h, d), query.new_empty(B, h, S, dtype=torch.promote_types(query.dtype, torch.float32))


@custom_op("vesalius::prefix_attention_backward", mutates_args=())
def prefix_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    output: Tensor,
    lse: Tensor,
    prompt_length: int,
    num_answers: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [B, S, h, d], dk and dv [B, S, k, d]) of grad [B, S, h, d]."""
    (B, h, S, d), k, P = query.shape, key.shape[1], prompt_length
    if not query.numel():
        zeros = [query.new_zeros(B, S, heads, d) for heads in (h, k, k)]
        return zeros[0], zeros[1], zeros[2]
    grad = _with_rows(grad)
    if not _takes(query):
        return gradients_by_parts(grad, query, key, value, starts, output, lse, P, num_answers, scale)
    by_row, by_key = (_constants(d, query.dtype, shared_bytes(query.device), by_key) for by_key in (False, True))
    share, deltas = h // k, torch.empty_like(lse)
    strides = [strides_of(x) for x in (query, key, value, grad.transpose(1, 2))]
    sizes = (S, P, _answer_length(S, P, num_answers), scale * LOG2E.value, share)
    grad_query = query.new_empty(B, S, h, d)
    arguments: tuple[Any, ...] = (query, key, value, output, grad, lse, deltas, grad_query, starts, *strides, *sizes)
    launch(_query_gradient_kernel, (_tiles(S, P, by_row["ROWS"]), h, B), *arguments, **by_row)

    tiles = _tiles(S, P, by_key["KEYS"])
    splits = _divisor(share, triton.cdiv(PROGRAMS, tiles * k * B))
    dtype = query.dtype if splits == 1 else torch.float32
    grad_key, grad_value = (query.new_empty(splits, B, S, k, d, dtype=dtype) for _ in range(2))
    arguments = (query, key, value, grad, lse, deltas, grad_key, grad_value, starts, *strides, *sizes, splits)
    launch(_key_gradient_kernel, (tiles, k * splits, B), *arguments, **by_key)
    if splits > 1:
        grad_key, grad_value = (x.sum(0, keepdim=True).to(query.dtype) for x in (grad_key, grad_value))
    return grad_query, grad_key[0], grad_value[0]


@prefix_attention_backward.register_fake
def _(grad, query, key, value, starts, output, lse, prompt_length, num_answers, scale):
    (B, h, S, d), k = query.shape, key.shape[1]
    return query.new_empty(B, S, h, d), query.new_empty(B, S, k, d), query.new_empty(B, S, k, d)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.prompt_length, ctx.num_answers, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor | None, _grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    gradients = prefix_attention_backward(grad, *ctx.saved_tensors, ctx.prompt_length, ctx.num_answers, ctx.scale)
    return (*(x.transpose(1, 2) for x in gradients), None, None, None, None)


prefix_attention_forward.register_autograd(_backward, setup_context=_setup)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_length: int,
    num_answers: int,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention [B, S, h, d] of rows `[prompt | answer_1 | ... | answer_G]`: query [B, h, S, d], key and value [B, k, S, d].

    `prompt_length` P, `num_answers` G (0: prompts alone), S = P + G T; `start` [B] integers: each prompt's first token after its
    padding (None: no padding); `scale`: of the scores, 1 / sqrt(d) by default. Rows are read where they lie, in any layout whose
    last dimension is contiguous. Differentiable in query, key and value. Padding has 0. Raises ValueError.
    """
    check_rows(query, key, value, prompt_length, num_answers, start)
    P, G, d = prompt_length, num_answers, query.shape[-1]
    starts = query.new_zeros(len(query), dtype=torch.int32) if start is None else start.contiguous()
    return prefix_attention_forward(*in_rows(query, key, value), starts, P, G, d**-0.5 if scale is None else scale)[0]


def check_rows(query: Tensor, key: Tensor, value: Tensor, prompt_length: int, num_answers: int, start: Tensor | None) -> None:
    """Raise ValueError, which names the argument, for what `prefix_attention` does not take."""
    if query.dim() != 4 or key.shape != value.shape or key.dim() != 4 or query.shape[1] % max(1, key.shape[1]):
        raise ValueError(
            f"query, key and value must be [B, h, S, d], [B, k, S, d] and the same, k of h, not {_shapes(query, key, value)}"
        )
    (B, _, S, d), P, G = query.shape, prompt_length, num_answers
    if key.shape != (B, key.shape[1], S, d):
        raise ValueError(f"key and value must have the prompts, tokens and head size of query, not {_shapes(query, key, value)}")
    if not (0 <= P <= S and G >= 0 and (S - P) % max(1, G) == 0 and (G or S == P)):
        raise ValueError(f"{S} tokens are not a prompt of {P} and {G} answers of one length")
    if start is not None and start.shape != (B,):
        raise ValueError(f"start must be [{B}], not {list(start.shape)}")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors)
