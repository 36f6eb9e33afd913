"""Attention of one new token a row: over the keys of its prompt, which are there once, and over those of its own answer.

    o = softmax(scale q [K_prompt, K_own]^T) [V_prompt, V_own]        K_prompt from `start` on, K_own up to `position`
    over parts of the keys: m = max s, t = sum exp(s - m), y = sum exp(s - m) v, merged at the largest m; o = y / t

B prompts of P tokens, N rows of which bounds[b] to bounds[b + 1] - 1 answer prompt b, room for R tokens an answer; h query heads,
k key heads, d head size. All queries that share a prompt's key head, those of G rows and h / k heads, are rows of one product with
its keys: a prompt's keys are read once a step, not once an answer and head, 2 k d (B P + N T) elements instead of 2 h d N (P + T)
as SDPA over an expanded cache. Two launches: the prompts in parts (program: prompt, key head, up to 64 queries, part of the keys),
then each row's own keys and the merge. This is Hydragen's and FlashInfer's cascade, with ragged groups. No gradients.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from kernels.language import tl, triton
from kernels.launch import LARGE_SHARED, SMALL_SHARED, LaunchConfig, launch, padded_power, runs_triton, shared_bytes
from kernels.partial_attention import attend, merge
from kernels.prefix_attention import LARGEST_HEAD, Strides, in_rows, strides_of

LOG2E = tl.constexpr(1.4426950408889634)
PROGRAMS = 264  # aimed at: two a multiprocessor
KEYS = 64  # of a tile


def prefix_decode_reference(
    new_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    bounds: Tensor,
    start: Tensor,
    position: Tensor,
    scale: float | None = None,
) -> Tensor:
    """The specification of `prefix_decode`, in any floating dtype."""
    N, h, _, d = new_query.shape
    prompts, end = torch.arange(len(start), device=start.device).repeat_interleave(bounds.diff()), int(position) + 1
    pairs = ((prompt_key, own_key), (prompt_value, own_value))
    key, value = (torch.cat([x[prompts], own[:, :, :end]], 2).repeat_interleave(h // x.shape[1], 1) for x, own in pairs)
    scores = (new_query @ key.mT) * (d**-0.5 if scale is None else scale)
    padding = torch.arange(key.shape[2], device=start.device) < start[prompts][:, None, None, None]
    return (scores.masked_fill(padding, float("-inf")).softmax(-1) @ value).transpose(1, 2)


class RowStrides(NamedTuple):
    """Elements from one row and head to the next of a tensor [N, h, d]."""

    row: Any
    head: Any


@triton.jit
def _load_rows(pointer, offsets, inside, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    # Rows of HEAD elements at these offsets, 0 where not `inside` and beyond HEAD
    column = tl.arange(0, WIDTH)
    return tl.load(pointer + offsets[:, None] + column[None, :], mask=inside[:, None] & (column < HEAD)[None, :], other=0.0)


@triton.jit
def _attend_tile(a, top, total, y, key, value, k_stride, v_stride, keys, end, scale, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    # One more tile of keys, those before `end`: at least one of them in a tile
    inside = keys < end
    kk = _load_rows(key, keys.to(tl.int64) * k_stride, inside, HEAD, WIDTH)
    s = tl.dot(a, tl.trans(kk), input_precision="tf32x3") * scale
    s = tl.where(inside[None, :], s, float("-inf"))
    larger = tl.maximum(top, tl.max(s, 1))
    w = tl.exp2(s - larger[:, None])
    shrink = tl.exp2(top - larger)
    vv = _load_rows(value, keys.to(tl.int64) * v_stride, inside, HEAD, WIDTH)
    return larger, total * shrink + tl.sum(w, 1), y * shrink[:, None] + tl.dot(w.to(vv.dtype), vv, input_precision="tf32x3")


@triton.jit
def _prompt_kernel(
    query, key, value, partial, stats, starts, bounds, q_strides, k_strides, v_strides, P, N, scale, share, splits,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Up to ROWS queries that share a key head of one prompt, over one part of its keys
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    key_head, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1) * share
    first, last = tl.load(bounds + b), tl.load(bounds + b + 1)
    flat = block * ROWS + tl.arange(0, ROWS)
    rows, head = (first + flat // share).to(tl.int64), key_head * share + flat % share
    inside = rows < last
    a = _load_rows(query, rows * q_strides.row + head * q_strides.head, inside, HEAD, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    start = tl.load(starts + b).to(tl.int32)
    each = tl.cdiv(tl.cdiv(P - start, KEYS), splits) * KEYS
    begin = start + split * each
    end = tl.where(first + block * ROWS // share < last, tl.minimum(begin + each, P), begin)  # nothing to do for no row
    for at in tl.range(begin, end, KEYS, num_stages=STAGES):
        top, total, y = _attend_tile(
            a, top, total, y, key + b * k_strides.prompt + key_head * k_strides.head,
            value + b * v_strides.prompt + key_head * v_strides.head, k_strides.token, v_strides.token,
            at + tl.arange(0, KEYS), end, scale, HEAD, WIDTH,
        )  # fmt: skip
    place = (split * N + rows) * heads + head
    column = tl.arange(0, WIDTH)
    tl.store(partial + place[:, None] * WIDTH + column[None, :], y, mask=inside[:, None])
    tl.store(stats + place * 2, top, mask=inside)
    tl.store(stats + place * 2 + 1, total, mask=inside)


@triton.jit
def _own_kernel(
    query, key, value, partial, stats, output, position, q_strides, k_strides, v_strides, N, scale, share, splits,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The queries of one row that share a key head: over the row's own keys, then what the prompt's parts made is added
    key_head, row, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0) * share
    member = tl.arange(0, ROWS)
    inside, head = member < share, key_head * share + member
    a = _load_rows(query, row * q_strides.row + head * q_strides.head, inside, HEAD, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.load(position).to(tl.int32) + 1
    for at in tl.range(0, end, KEYS, num_stages=STAGES):
        top, total, y = _attend_tile(
            a, top, total, y, key + row * k_strides.prompt + key_head * k_strides.head,
            value + row * v_strides.prompt + key_head * v_strides.head, k_strides.token, v_strides.token,
            at + tl.arange(0, KEYS), end, scale, HEAD, WIDTH,
        )  # fmt: skip
    column = tl.arange(0, WIDTH)
    for split in range(0, splits):
        place = (split * N + row) * heads + head
        other = tl.load(stats + place * 2, mask=inside, other=float("-inf"))
        count = tl.load(stats + place * 2 + 1, mask=inside, other=0.0)
        part = tl.load(partial + place[:, None] * WIDTH + column[None, :], mask=inside[:, None], other=0.0)
        larger = tl.maximum(top, other)  # a number: every row has seen its own token
        mine, theirs = tl.exp2(top - larger), tl.exp2(other - larger)
        total = total * mine + count * theirs
        y = y * mine[:, None] + part * theirs[:, None]
        top = larger
    out = output + ((row * heads + head) * HEAD)[:, None] + column[None, :]
    tl.store(out, (y / total[:, None]).to(output.dtype.element_ty), mask=inside[:, None] & (column < HEAD)[None, :])


def _constants(d: int, rows: int, dtype: torch.dtype, shared: int) -> dict[str, Any]:
    """Tiles of at least 16 rows, which a product has, and at most 64."""
    wide = dtype.itemsize > 2
    sizes = {"HEAD": d, "WIDTH": padded_power(d), "ROWS": max(16, padded_power(rows, 16 if wide else 64))}
    return sizes | {"KEYS": 16 if wide else KEYS, "STAGES": 1 if wide or shared <= 128 << 10 else 3, "num_warps": 4}


def launch_configs() -> Iterator[LaunchConfig]:
    """8 answers to a prompt of 704 tokens: 16 query and 2 key heads of 128 (Qwen2.5-VL 3B), those in fp32, and 32 of 80."""
    vector, ids = torch.empty(0, device="meta"), torch.empty(0, dtype=torch.int32, device="meta")
    for d, h, k, dtype in ((128, 16, 2, torch.bfloat16), (128, 16, 2, torch.float32), (80, 32, 32, torch.bfloat16)):
        x, share, N = torch.empty(0, dtype=dtype, device="meta"), h // k, 64
        q, prompt, own = RowStrides(h * d, d), Strides(704 * k * d, d, k * d), Strides(256 * k * d, 256 * d, d)
        scale = d**-0.5 * LOG2E.value
        for end, shared, archs in (("", LARGE_SHARED, (80, 90, 100)), (", 99 KB", SMALL_SHARED, (89,))):
            name = f"{h} on {k} heads of {d}{', fp32' if dtype == torch.float32 else ''}{end}"
            arguments: tuple[Any, ...] = (x, x, x, vector, vector, ids, ids, q, prompt, prompt, 704, N, scale, share, 4)
            constants = _constants(d, 8 * share, dtype, shared)
            yield LaunchConfig(f"decode, prompts, {name}", _prompt_kernel, arguments, constants, archs)
            arguments = (x, x, x, vector, vector, x, ids, q, own, own, N, scale, share, 4)
            constants = _constants(d, share, dtype, shared)
            yield LaunchConfig(f"decode, own tokens, {name}", _own_kernel, arguments, constants, archs)


@custom_op("vesalius::prefix_decode", mutates_args=())
def prefix_decode_op(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    bounds: Tensor,
    starts: Tensor,
    position: Tensor,
    most_rows: int,
    scale: float,
) -> Tensor:
    """o [N, h, d] of query [N, h, d]."""
    (N, h, d), (B, k, P, _) = query.shape, prompt_key.shape
    if not query.numel():
        return query.new_empty(query.shape)
    if not (runs_triton(query) and 16 <= d <= LARGEST_HEAD):
        return _decode_by_prompt(query, prompt_key, prompt_value, own_key, own_value, bounds, starts, position, scale)
    share, shared = h // k, shared_bytes(query.device)
    constants = _constants(d, most_rows * share, query.dtype, shared)
    blocks = triton.cdiv(most_rows * share, constants["ROWS"])
    splits = max(1, min(triton.cdiv(PROGRAMS, blocks * k * B), triton.cdiv(P, 2 * constants["KEYS"])))
    partial, stats = (query.new_empty(splits, N, h, width, dtype=torch.float32) for width in (constants["WIDTH"], 2))
    strides = RowStrides(query.stride(0), query.stride(1))
    prompts = (query, prompt_key, prompt_value, partial, stats, starts, bounds, strides, strides_of(prompt_key))
    sizes = (scale * LOG2E.value, share, splits)
    launch(_prompt_kernel, (blocks * splits, k, B), *prompts, strides_of(prompt_value), P, N, *sizes, **constants)
    output, constants = query.new_empty(N, h, d), _constants(d, share, query.dtype, shared)
    own = (query, own_key, own_value, partial, stats, output, position, strides, strides_of(own_key), strides_of(own_value))
    launch(_own_kernel, (k, N), *own, N, *sizes, **constants)
    return output


@prefix_decode_op.register_fake
def _(query, prompt_key, prompt_value, own_key, own_value, bounds, starts, position, most_rows, scale):
    return query.new_empty(query.shape)


def _decode_by_prompt(
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    bounds: Tensor,
    starts: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """Where no Triton runs: a product for prompts that start and are answered alike, one with all own keys, and the merge."""
    (N, h, d), k, end = query.shape, prompt_key.shape[1], int(position) + 1
    rows = query.unflatten(1, (k, h // k))  # [N, k, share, d]
    parts, places, firsts = [], bounds.tolist(), starts.tolist()
    alike = itertools.groupby(range(len(firsts)), lambda b: (firsts[b], places[b + 1] - places[b]))
    for (start, answers), group in alike:
        prompts = list(group)
        if answers:
            some = slice(prompts[0], prompts[-1] + 1)
            own_rows = rows[places[some.start] : places[some.stop]].unflatten(0, (-1, answers))  # [prompts, answers, k, share, d]
            keys, values = (x[some, :, start:] for x in (prompt_key, prompt_value))
            parts.append(attend(own_rows.transpose(1, 2).flatten(2, 3), keys, values, scale))
    by_row = ([x.unflatten(2, (-1, h // k)).transpose(1, 2).flatten(0, 1) for x in column] for column in zip(*parts, strict=True))
    of_prompts = (columns[0] if len(columns) == 1 else torch.cat(columns) for columns in by_row)
    own = attend(rows, own_key[:, :, :end], own_value[:, :, :end], scale)
    return merge(*own, *of_prompts)[0].reshape(N, h, d)


def prefix_decode(
    new_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    bounds: Tensor,
    start: Tensor,
    position: Tensor,
    scale: float | None = None,
    most_rows: int | None = None,
) -> Tensor:
    """Attention [N, 1, h, d] of new_query [N, h, 1, d] over prompt_key and prompt_value [B, k, P, d], of which row n reads those of
    prompt b from start[b] on where bounds[b] <= n < bounds[b + 1], and over own_key and own_value [N, k, R, d] up to `position`.

    bounds [B + 1], start [B] and position [1] are integers on the device of the keys and are not waited for; bounds begin with 0
    and end with N. `most_rows`: at least how many rows a prompt has at most (N by default). `scale`: of the scores, 1 / sqrt(d) by
    default. What lies in own_key and own_value behind `position` is not read. No gradients. Raises ValueError.
    """
    (N, h, T, d), (B, k, _, _) = new_query.shape, prompt_key.shape
    if T != 1 or h % max(1, k) or prompt_key.shape != prompt_value.shape or prompt_key.shape[3] != d:
        shapes = f"{list(new_query.shape)}, {list(prompt_key.shape)}, {list(prompt_value.shape)}"
        raise ValueError(f"new_query, prompt_key and prompt_value must be [N, h, 1, d], [B, k, P, d] and the same, not {shapes}")
    if own_key.shape != own_value.shape or own_key.shape != (N, k, own_key.shape[2], d):
        raise ValueError(f"own_key and own_value must be [{N}, {k}, R, {d}], not {list(own_key.shape)}, {list(own_value.shape)}")
    if bounds.shape != (B + 1,) or start.shape != (B,) or position.shape != (1,):
        shapes = f"{list(bounds.shape)}, {list(start.shape)}, {list(position.shape)}"
        raise ValueError(f"bounds, start and position must be [{B + 1}], [{B}] and [1], not {shapes}")
    states = in_rows(new_query[:, :, 0], prompt_key, prompt_value, own_key, own_value)
    indices = (x.contiguous() for x in (bounds, start, position))
    return prefix_decode_op(*states, *indices, N if most_rows is None else most_rows, d**-0.5 if scale is None else scale)[:, None]
