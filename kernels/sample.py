"""The next token of every row of logits, drawn at a uniform number, and its log-probability under what it was drawn from.

    z = penalised(x) / temperature      kept: the top_k largest; of these the fewest with a mass of top_p; of these p >= min_p max p
    token = min{v : sum_{w <= v} e_w > uniform sum_w e_w},   e_v = exp(z_v - max z) where kept, else 0
    logprob = z_token - max z - log sum_w e_w                temperature 0: the first of the largest, its log-probability at 1

N rows of logits [N, V]. A row is read once: a first launch leaves largest, sum and mode of each tile of 4096 columns, a second
finds the tile where the sum passes uniform times the whole, and reads that one again: 4 N V bytes; PyTorch has a dozen passes.
Where tokens are cut off by rank or mass a launch before these finds the smallest logit that stays, without a sort: 16 sweeps settle
two bits each of the float as an ordered integer, out of L2, where 64 rows of 151936 lie. Of logits equal to it, mass drops the
first, as a stable sort does; rank keeps them all. Sums have one order: the same logits give the same tokens. No gradients.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.language import tl, triton
from kernels.launch import LaunchConfig, launch, padded_power, runs_triton, triton_op

TILE = 4096  # columns that a program holds
BLOCK = 4096  # columns of a step of the sweeps


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (N, V) of `seen` tokens (N, V), divided by `penalty` where positive, else multiplied (CTRL, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def cumulative_sum(x: Tensor) -> Tensor:
    """Of each row (N, V). On CUDA torch's own sums differ from run to run, and it refuses them where determinism is asked for
    (`--full_determinism`): there each pass adds what lies twice as far before, V rounded up to a power of two in all.
    """
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(-1)
    distance = 1
    while distance < x.shape[-1]:
        x = torch.cat([x[..., :distance], x[..., distance:] + x[..., :-distance]], -1)
        distance *= 2
    return x


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Logits (N, V) with -inf outside top-k, then top-p, then min-p, each of what the one before left."""
    if top_k > 0:
        threshold = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        # ascending: the smallest tokens whose mass stays within 1 - top_p go
        ordered, order = logits.sort(dim=-1, stable=True)
        drop = cumulative_sum(ordered.softmax(-1)) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    if min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return logits


def sample_reference(
    logits: Tensor,
    uniform: Tensor,
    seen: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The specification of `sample`, in float32 or float64."""
    if seen is not None:
        logits = penalise_repetition(logits, seen, repetition_penalty)
    if temperature == 0:
        best, token_ids = logits.max(-1)
        return token_ids, best - logits.logsumexp(-1)
    logits = truncate(logits / temperature if temperature != 1 else logits, top_k, top_p, min_p)
    highest, mode = logits.max(-1, keepdim=True)
    weights = (logits - highest).exp_()
    cumulative = cumulative_sum(weights)
    total = cumulative[:, -1:]
    token_ids = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    token_ids = torch.where(token_ids < logits.shape[-1], token_ids, mode)  # uniform * total may round up to total
    logprobs = (logits.gather(1, token_ids) - highest - total.log()).squeeze(1)
    return token_ids.squeeze(1), logprobs


@triton.jit
def _load_logits(logits, seen, offsets, inside, penalty, temperature, PENALISE: tl.constexpr):
    # z at these offsets, -inf where not `inside`; both zeros are the same one, as integers too
    z = tl.load(logits + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    if PENALISE:
        was = tl.load(seen + offsets, mask=inside, other=0)
        z = tl.where(was != 0, tl.where(z > 0, z / penalty, z * penalty), z)
    return z / temperature + 0.0


@triton.jit
def _ordered(z):
    # Floats as unsigned integers of the same order
    bits = z.to(tl.uint32, bitcast=True)
    sign, ones = tl.full(bits.shape, 0x80000000, tl.uint32), tl.full(bits.shape, 0xFFFFFFFF, tl.uint32)
    return tl.where(bits >= sign, bits ^ ones, bits | sign)


@triton.jit
def _search(
    logits, seen, row, V, penalty, temperature, top, least, goal,
    PENALISE: tl.constexpr, BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The largest integer at which at least `goal` logits are not below it; or, BY_MASS, at which the mass of those from `least`
    # on that are below it is at most `goal`. It is a logit's. Two bits a sweep, the highest first.
    columns = tl.arange(0, BLOCK)
    found = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 0x40000000, tl.uint32)
    for _ in range(0, 16):
        first, second = found + bit, found + bit + bit
        third = second + bit
        a, b, c = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            z = _load_logits(logits, seen, row + start + columns, inside, penalty, temperature, PENALISE)
            key = _ordered(z)
            if BY_MASS:
                e = tl.where(inside & (key >= least), tl.exp(z - top), 0.0)
                a += tl.where(key < first, e, 0.0)
                b += tl.where(key < second, e, 0.0)
                c += tl.where(key < third, e, 0.0)
            else:
                a += (inside & (key >= first)).to(tl.float32)
                b += (inside & (key >= second)).to(tl.float32)
                c += (inside & (key >= third)).to(tl.float32)
        if BY_MASS:
            settled = (tl.sum(a, 0) <= goal).to(tl.uint32) + (tl.sum(b, 0) <= goal).to(tl.uint32)
            settled += (tl.sum(c, 0) <= goal).to(tl.uint32)
        else:
            settled = (tl.sum(a, 0) >= goal).to(tl.uint32) + (tl.sum(b, 0) >= goal).to(tl.uint32)
            settled += (tl.sum(c, 0) >= goal).to(tl.uint32)
        found += settled * bit
        bit = bit >> 2
    return found


@triton.jit
def _cut_kernel(
    logits, seen, cuts, firsts, V, penalty, temperature, top_k, tail, log_min_p,
    PENALISE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A row stays where its logits are above its cut, or equal to it from its first column on; tail: 1 - top_p
    index = tl.program_id(0)
    row, columns = index.to(tl.int64) * V, tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        z = _load_logits(logits, seen, row + start + columns, inside, penalty, temperature, PENALISE)
        largest = tl.maximum(largest, z)
    top = tl.max(largest, 0)
    least, first = tl.zeros([1], tl.uint32), tl.zeros([1], tl.int32)
    if TOP_K:
        least = _search(logits, seen, row, V, penalty, temperature, top, least, top_k, PENALISE, False, BLOCK)
    if TOP_P:
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            z = _load_logits(logits, seen, row + start + columns, inside, penalty, temperature, PENALISE)
            mass += tl.where(inside & (_ordered(z) >= least), tl.exp(z - top), 0.0)
        goal = tail * tl.sum(mass, 0)
        cut = _search(logits, seen, row, V, penalty, temperature, top, least, goal, PENALISE, True, BLOCK)
        cut = tl.minimum(cut, _ordered(top + tl.zeros([1], tl.float32)))  # where the tail is all, as far as it can be told
        mass, equal = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            z = _load_logits(logits, seen, row + start + columns, inside, penalty, temperature, PENALISE)
            key = _ordered(z)
            mass += tl.where(inside & (key >= least) & (key < cut), tl.exp(z - top), 0.0)
            equal += (inside & (key == cut)).to(tl.int32)
        each = tl.exp(_as_float(cut) - top)
        dropped = tl.minimum(((goal - tl.sum(mass, 0)) / each).to(tl.int32), tl.sum(equal, 0) - 1)
        passed = tl.zeros([1], tl.int32)
        first += V
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            z = _load_logits(logits, seen, row + start + columns, inside, penalty, temperature, PENALISE)
            tie = (inside & (_ordered(z) == cut)).to(tl.int32)
            at = (tie != 0) & (passed + tl.cumsum(tie, 0) - 1 == dropped)
            first = tl.minimum(first, tl.min(tl.where(at, start + columns, V), 0))
            passed += tl.sum(tie, 0)
        least = cut
    value = _as_float(least)
    likely = top + log_min_p
    first = tl.where(likely > value, 0, first)
    tl.store(cuts + index + tl.arange(0, 1), tl.maximum(value, likely))
    tl.store(firsts + index + tl.arange(0, 1), first)


@triton.jit
def _as_float(key):
    # The float whose `_ordered` this is; that of 0, which is none's, as the smallest
    sign, ones = tl.full(key.shape, 0x80000000, tl.uint32), tl.full(key.shape, 0xFFFFFFFF, tl.uint32)
    bits = tl.where(key >= sign, key ^ sign, key ^ ones)
    return tl.where(key == 0, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _load_kept(logits, seen, cuts, firsts, index, columns, V, penalty, temperature, PENALISE: tl.constexpr, CUT: tl.constexpr):
    # z of these columns of a row, -inf where it is cut off
    inside = columns < V
    z = _load_logits(logits, seen, index.to(tl.int64) * V + columns, inside, penalty, temperature, PENALISE)
    if CUT:
        cut, first = tl.load(cuts + index), tl.load(firsts + index)
        z = tl.where((z < cut) | ((z == cut) & (columns < first)), float("-inf"), z)  # what is no number stays
    return z


@triton.jit
def _tile_kernel(
    logits, seen, cuts, firsts, stats, modes, V, penalty, temperature,
    PENALISE: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # One tile of a row: its largest logit, the sum of exp(z - that), and the first column that has it
    index, tile = tl.program_id(0), tl.program_id(1)
    columns = tile * TILE + tl.arange(0, TILE)
    z = _load_kept(logits, seen, cuts, firsts, index, columns, V, penalty, temperature, PENALISE, CUT)
    top = tl.max(z, 0)
    place = index * tl.num_programs(1) + tile
    tl.store(stats + place * 2, top)
    tl.store(stats + place * 2 + 1, tl.sum(tl.where(z == float("-inf"), 0.0, tl.exp(z - top)), 0))
    tl.store(modes + place, tl.min(tl.where(z == top, columns, V - 1), 0))


@triton.jit
def _choose_kernel(
    logits, seen, cuts, firsts, stats, modes, uniform, token_ids, logprobs, V, tiles, penalty, temperature,
    GREEDY: tl.constexpr, PENALISE: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # One row, from what its tiles left. A tile or column is the first where the running sum is above the goal; where rounding
    # leaves none it is the mode, or the tile's last column that can be
    index, tile = tl.program_id(0), tl.arange(0, TILES)
    place = index * tiles + tile
    tops = tl.load(stats + place * 2, mask=tile < tiles, other=float("-inf"))
    sums = tl.load(stats + place * 2 + 1, mask=tile < tiles, other=0.0)
    top = tl.max(tops, 0)
    sums = tl.where(sums > 0, sums * tl.exp(tops - top), sums)
    running = tl.cumsum(sums, 0)
    total = tl.sum(tl.where(tile == tiles - 1, running, 0.0), 0)
    leading = tl.min(tl.where(tops == top, tile, tiles - 1), 0)
    token = tl.load(modes + index * tiles + leading)
    chosen = top
    if not GREEDY:
        goal = tl.load(uniform + index) * total
        own = tl.min(tl.where((running > goal) & (sums > 0), tile, tiles), 0)
        before = tl.sum(tl.where(tile == own - 1, running, 0.0), 0)
        columns = own * TILE + tl.arange(0, TILE)
        z = _load_kept(logits, seen, cuts, firsts, index, columns, V, penalty, temperature, PENALISE, CUT)
        e = tl.where(z == float("-inf"), 0.0, tl.exp(z - top))
        column = tl.min(tl.where((before + tl.cumsum(e, 0) > goal) & (e > 0), columns, V), 0)
        last = tl.max(tl.where(e > 0, columns, -1), 0)
        column = tl.where(column < V, column, last)
        is_there = (own < tiles) & (column >= 0)
        token = tl.where(is_there, column, token)
        chosen = tl.where(is_there, tl.max(tl.where(columns == column, z, float("-inf")), 0), top)
    tl.store(token_ids + index, token.to(tl.int64))
    tl.store(logprobs + index, chosen - top - tl.log(total))


def _tile_constants(V: int) -> dict[str, Any]:
    return {"TILE": padded_power(V, TILE), "num_warps": 8}


def _cut_constants(V: int) -> dict[str, Any]:
    return {"BLOCK": padded_power(V, BLOCK), "num_warps": 16}


def launch_configs() -> Iterator[LaunchConfig]:
    """64 rows of 151936 logits: plain, greedy, with a penalty, and cut off by rank and mass."""
    V, tiles = 151936, triton.cdiv(151936, TILE)
    row, ids = torch.empty(0, device="meta"), torch.empty(0, dtype=torch.int64, device="meta")
    seen, places = (torch.empty(0, dtype=dtype, device="meta") for dtype in (torch.uint8, torch.int32))
    for name, greedy, penalise, cut in (
        ("plain", False, False, False),
        ("greedy", True, False, False),
        ("penalty", False, True, False),
        ("cut off", False, False, True),
        ("penalty, cut off", False, True, True),
    ):
        flags = {"PENALISE": penalise, "CUT": cut}
        read: tuple[Any, ...] = (row, seen if penalise else None, row if cut else None, places if cut else None)
        arguments = (*read, row, places, V, 1.1, 0.9)
        if not greedy:
            yield LaunchConfig(f"sample, tiles, {name}", _tile_kernel, arguments, flags | _tile_constants(V))
        arguments = (*read, row, places, row, ids, row, V, tiles, 1.1, 0.9)
        constants = flags | {"GREEDY": greedy, "TILES": padded_power(tiles)} | _tile_constants(V)
        yield LaunchConfig(f"sample, {name}", _choose_kernel, arguments, constants)
    for name, penalise, rank, mass in (("rank", False, True, False), ("mass", False, False, True), ("all", True, True, True)):
        arguments = (row, seen if penalise else None, row, places, V, 1.1, 0.9, 50.0, 0.05, -3.0)
        flags = {"PENALISE": penalise, "TOP_K": rank, "TOP_P": mass}
        yield LaunchConfig(f"sample, cut by {name}", _cut_kernel, arguments, flags | _cut_constants(V))


@triton_op("vesalius::sample")
def sample_op(
    logits: Tensor,
    uniform: Tensor,
    seen: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> tuple[Tensor, Tensor]:
    """(token_ids [N], logprobs [N]) of contiguous tensors; temperature 0 is greedy."""
    N, V = logits.shape
    if not runs_triton(logits) or not N:
        cut_off: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        return sample_reference(logits, uniform, seen, temperature=temperature, repetition_penalty=repetition_penalty, **cut_off)
    greedy, penalise = temperature == 0, seen is not None
    cut = not greedy and (top_k > 0 or top_p < 1 or min_p > 0)
    divisors = (float(repetition_penalty), 1.0 if greedy else float(temperature))
    was_seen = None if seen is None else seen.view(torch.uint8)
    cuts, firsts = (logits.new_empty(N, dtype=dtype) if cut else None for dtype in (torch.float32, torch.int32))
    if cut:
        rank, lowest = float(min(top_k, V)), math.log(min_p) if min_p > 0 else -math.inf
        flags = {"PENALISE": penalise, "TOP_K": top_k > 0, "TOP_P": top_p < 1}
        sizes = (V, *divisors, rank, 1.0 - top_p, lowest)
        launch(_cut_kernel, (N,), logits, was_seen, cuts, firsts, *sizes, **flags, **_cut_constants(V))
    constants = {"PENALISE": penalise, "CUT": cut} | _tile_constants(V)
    tiles = triton.cdiv(V, constants["TILE"])
    stats, modes = (logits.new_empty(N, tiles, width, dtype=dtype) for width, dtype in ((2, torch.float32), (1, torch.int32)))
    read = (logits, was_seen, cuts, firsts, stats, modes)
    launch(_tile_kernel, (N, tiles), *read, V, *divisors, **constants)
    token_ids, logprobs = logits.new_empty(N, dtype=torch.int64), logits.new_empty(N, dtype=torch.float32)
    constants |= {"GREEDY": greedy, "TILES": padded_power(tiles)}
    launch(_choose_kernel, (N,), *read, uniform, token_ids, logprobs, V, tiles, *divisors, **constants)
    return token_ids, logprobs


def sample(
    logits: Tensor,
    uniform: Tensor,
    seen: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """logits (N, V) and `uniform` (N,) in [0, 1) -> (token_ids (N,), logprobs (N,)), see above; log-probs in nats.

    Temperature 0 is greedy, and ignores what truncates. top_k 0, top_p 1 and min_p 0 leave the distribution whole. `seen` (N, V),
    bool: the tokens whose logits are divided by `repetition_penalty` where positive, else multiplied. Half types are computed in
    float32. Raises ValueError that names the argument.
    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be (N, V) with V at least 1, not {tuple(logits.shape)}")
    if uniform.shape != logits.shape[:1]:
        raise ValueError(f"uniform must be ({logits.shape[0]},), not {tuple(uniform.shape)}")
    if seen is not None and (seen.shape != logits.shape or seen.dtype != torch.bool):
        raise ValueError(f"seen must be {tuple(logits.shape)} of bool, not {tuple(seen.shape)} of {seen.dtype}")
    for name, value, right in (
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("min_p", min_p, 0 <= min_p <= 1),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0),
    ):
        if not right:
            raise ValueError(f"{name} is out of range: {value}")
    logits = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
    seen = None if seen is None or repetition_penalty == 1 else seen.contiguous()
    numbers = (float(temperature), top_k, float(top_p), float(min_p), float(repetition_penalty))
    return sample_op(logits.contiguous(), uniform.contiguous(), seen, *numbers)
