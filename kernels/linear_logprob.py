"""Log-probability of given tokens and entropy under a linear head, without ever holding [N, V] logits.

    z = hidden weight^T / temperature        m = max_v z     s = sum_v exp(z - m)     zbar = sum_v p (z - m)
    logp = z_y - m - log s                   entropy = log s - zbar                    p = exp(z - m) / s
    dz_v = g (1[v = y] - p_v) - h p_v (z_v - m - zbar)       g, h: incoming gradients of logp and entropy
    dhidden = dz weight / temperature        dweight = dz^T hidden / temperature

N rows (tokens), H hidden, V vocabulary. A row whose y is outside 0 to V - 1 (-100) is skipped: 0, and no gradient. Rows are taken
in chunks of C: one GEMM for the logits, then one pass over the chunk; the backward recomputes the logits (4 GEMMs of 2 N H V FLOP
in all). linear_grpo.py, which knows its loss, needs three.
On CUDA the forward goes by tiles of 8 M logits, of 2048 rows at most, that stay in the L2 cache: 16.8 MB of workspace. Elsewhere,
and in the backward, C V logits in the dtype of `hidden`; dweight is summed in fp32 over chunks. Improves on TRL's chunked
log-probs by skipping rows and by passes over logits that stay in cache.

The ops are opaque to torch.compile: a loop of GEMMs over one reused buffer has nothing to fuse, and tracing it would undo the
reuse. Their Triton kernels compile and run alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from kernels.language import tl, triton
from kernels.launch import LaunchConfig, launch, runs_triton

SKIP = -100  # what stands where a row has no target
# Elements to which rows of logits are padded: where V is odd the GEMMs that read them would otherwise take single elements.
ROW_MULTIPLE = 64
# What a chunk of logits may take on a CPU, and a block of rows that the elementwise passes keep in its L2 cache.
CPU_CHUNK_BYTES = 32 << 20
CPU_BLOCK_BYTES = 1 << 19


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The specification of `linear_logprob`, differentiable by autograd in any floating dtype."""
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    keep = in_vocabulary(target_ids, weight)
    chosen = logprobs.gather(-1, target_ids.long().where(keep, 0)[:, None])[:, 0]
    p = logprobs.exp()
    entropy = -torch.where(p > 0, p * logprobs, 0.0).sum(-1)
    return chosen.where(keep, 0.0), entropy.where(keep, 0.0)


def in_vocabulary(target_ids: Tensor, weight: Tensor) -> Tensor:
    """Where a target is one of the V tokens; elsewhere (-100) there is none."""
    return (target_ids >= 0) & (target_ids < len(weight))


# Columns a program takes at a time, a multiple of eight neighbours (16 bytes of bf16) a thread, and blocks of them in flight.
STATS_CONSTANTS: dict[str, Any] = {"BLOCK": 4096, "STAGES": 3, "num_warps": 8}
GRADIENT_CONSTANTS: dict[str, Any] = {"BLOCK": 4096, "STAGES": 3, "num_warps": 8}
# Rows and logits of the tile that the CUDA forward keeps in L2: 4096 columns, and more of them where there are fewer rows.
TILE_ROWS, TILE_LOGITS = 2048, 8 << 20
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _exponent(x, maximum, scale):
    """(x - maximum) scale / log2(e) in units of exp2, bounded so that 0 * exponent is 0 where x is -inf; a NaN passes."""
    d = (x - maximum) * scale
    return tl.where(d < -1000.0, -1000.0, d)


@triton.jit
def online_stats(row, num_columns, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """m, s and zbar s of one row of logits, z = logits scale / log2(e), in one sweep.

    Each thread keeps the statistics of its own columns, LANE neighbours (16 bytes) at a time: no step waits for another thread.
    """
    LANE: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    columns = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    maximum = tl.full([BLOCK // LANE], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)
    moment = tl.zeros([BLOCK // LANE], tl.float32)
    for start in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
        inside = start + columns < num_columns
        x = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(x, 1))
        d = _exponent(x, larger[:, None], scale)
        e = tl.exp2(d)
        shift = _exponent(maximum, larger, scale)
        shrink = tl.exp2(shift)
        moment = shrink * (moment + shift * total) + tl.sum(e * d, 1)
        total = shrink * total + tl.sum(e, 1)
        maximum = larger
    top = tl.max(maximum, 0)
    shift = _exponent(maximum, top, scale)
    shrink = tl.exp2(shift)
    return top, tl.sum(shrink * total, 0), tl.sum(shrink * (moment + shift * total), 0) / LOG2E


@triton.jit
def write_gradient(
    row, num_columns, target, chosen, scale, top, total, mean, gain, slope,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Overwrite a row of logits by gain (1[v = target] - p_v) - slope p_v (z_v - m - zbar), last column first.

    In that order the sweep meets what `online_stats` left in L2. `chosen` is the target's logit: every warp must have read it
    before the sweep of the fastest writes there. A target outside the row has no logit.
    """
    tl.debug_barrier()
    columns = tl.arange(0, BLOCK)
    blocks = tl.cdiv(num_columns, BLOCK)
    share, tilt = gain / total, slope / total
    for step in tl.range(0, blocks, num_stages=STAGES):
        offsets = (blocks - 1 - step) * BLOCK + columns
        inside = offsets < num_columns
        x = tl.load(row + offsets, mask=inside, other=0.0).to(tl.float32)
        if ENTROPY:
            d = _exponent(x, top, scale)
            dz = -tl.exp2(d) * (share + tilt * (d / LOG2E - mean))
        else:
            dz = -tl.exp2((x - top) * scale) * share
        tl.store(row + offsets, dz.to(row.dtype.element_ty), mask=inside)
    d = _exponent(chosen, top, scale)
    dz = gain - tl.exp2(d) * (share + tilt * (d / LOG2E - mean))
    tl.debug_barrier()
    tl.store(row + target, dz.to(row.dtype.element_ty), mask=(target >= 0) & (target < num_columns))


@triton.jit
def _stats_kernel(
    logits, stride, target_ids, stats, num_rows, first_column, num_columns, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    # One row: fold the logits of columns [first_column, first_column + num_columns) into its stats, five rows of [5, num_rows]:
    # those of `row_stats`, but the target's logit in the place of logp, and the sum of e z in that of its mean
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    top, total, moment = online_stats(row, num_columns, scale, BLOCK, STAGES)
    target = tl.load(target_ids + index) - first_column
    mine = stats + index
    here = (target >= 0) & (target < num_columns)
    chosen = tl.load(row + tl.where(here, target, 0), mask=here, other=0.0).to(tl.float32)
    if first_column > 0:
        chosen = tl.where(here, chosen, tl.load(mine))
        before = tl.load(mine + 2 * num_rows)
        largest = tl.maximum(top, before)
        old, new = _exponent(before, largest, scale), _exponent(top, largest, scale)
        past_total, past_moment = tl.load(mine + 3 * num_rows), tl.load(mine + 4 * num_rows)
        moment = tl.exp2(new) * (moment + new / LOG2E * total) + tl.exp2(old) * (past_moment + old / LOG2E * past_total)
        total = tl.exp2(new) * total + tl.exp2(old) * past_total
        top = largest
    tl.store(mine, chosen)
    tl.store(mine + 2 * num_rows, top)
    tl.store(mine + 3 * num_rows, total)
    tl.store(mine + 4 * num_rows, moment)


@triton.jit
def _gradient_kernel(
    logits, stride, num_columns, scale, target_ids, softmax, grad_logprobs, grad_entropy,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One row; `softmax` is a SoftmaxStats
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    top, total, mean = tl.load(softmax.maxima + index), tl.load(softmax.sums + index), tl.load(softmax.means + index)
    inverse_temperature = scale / LOG2E
    gain = tl.load(grad_logprobs + index) * inverse_temperature
    slope = 0.0
    if ENTROPY:
        slope = tl.load(grad_entropy + index) * inverse_temperature
    target = tl.load(target_ids + index)
    there = (target >= 0) & (target < num_columns)
    chosen = tl.load(row + target, mask=there, other=0.0).to(tl.float32)
    gain, slope = tl.where(there, gain, 0.0), tl.where(there, slope, 0.0)
    write_gradient(row, num_columns, target, chosen, scale, top, total, mean, gain, slope, ENTROPY, BLOCK, STAGES)


class SoftmaxStats(NamedTuple):
    """m, s and zbar of each row of logits; in a kernel pointers."""

    maxima: Any
    sums: Any
    means: Any


def launch_configs() -> Iterator[LaunchConfig]:
    """Statistics of a tile and of whole rows, and the gradient with and without an entropy term, at V = 151936 and an odd one."""
    ids, vector = torch.empty(0, dtype=torch.int64, device="meta"), torch.empty(0, device="meta")
    for dtype in (torch.bfloat16, torch.float32):
        logits, suffix = torch.empty(0, dtype=dtype, device="meta"), "" if dtype == torch.bfloat16 else ", fp32"
        for name, columns, first in (("tile", 4096, 8192), ("rows", 151936, 0)):
            arguments: tuple[Any, ...] = (logits, columns, ids, vector, 2048, first, columns, LOG2E.value)
            yield LaunchConfig(f"logit stats, {name}{suffix}", _stats_kernel, arguments, STATS_CONSTANTS)
        for entropy, columns in ((False, 151936), (True, 151936), (False, 50257)):
            softmax = SoftmaxStats(vector, vector, vector)
            sizes = (row_stride(columns), columns, LOG2E.value)
            arguments = (logits, *sizes, ids, softmax, vector, vector if entropy else None)
            name = f"logit gradient{', entropy' if entropy else ''}{suffix}{', odd vocabulary' if columns % 16 else ''}"
            yield LaunchConfig(name, _gradient_kernel, arguments, {"ENTROPY": entropy} | GRADIENT_CONSTANTS)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Reductions run in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_size(hidden: Tensor, weight: Tensor) -> int:
    """Rows of logits to hold at once: on CUDA the power of two, 256 to 16384, that takes at most a quarter of the free memory.

    A step whose rows fit one chunk has no sum of dweight: it is written once, in the dtype of the weight.
    """
    row_bytes = weight.shape[0] * hidden.element_size()
    if not hidden.is_cuda:
        return max(1, CPU_CHUNK_BYTES // row_bytes)
    cached = torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
    rows = (torch.cuda.mem_get_info(hidden.device)[0] + cached) // 4 // row_bytes
    return min(16384, max(256, 1 << max(0, rows.bit_length() - 1)))


def row_stride(num_columns: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-num_columns // ROW_MULTIPLE) * ROW_MULTIPLE


def logit_buffer(hidden: Tensor, rows: int, num_columns: int) -> Tensor:
    """Room for (rows, num_columns) logits, in the dtype of `hidden`, its rows padded; on a CPU they are not, whose products of
    bfloat16 (oneDNN with AMX) read what lies beyond a row, and NaN there comes through."""
    stride = num_columns if hidden.device.type == "cpu" else row_stride(num_columns)
    return hidden.new_empty((rows, stride))[:, :num_columns]


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Row blocks of a chunk of logits that fit the cache, with an accumulation-dtype scratch of the same shape."""
    dtype = accumulate_dtype(logits.dtype)
    rows = max(1, min(len(logits), CPU_BLOCK_BYTES // (logits.shape[1] * dtype.itemsize)))
    scratch = logits.new_empty((2, rows, logits.shape[1]), dtype=dtype)
    for start in range(0, len(logits), rows):
        block = logits[start : start + rows]
        yield slice(start, start + rows), block, scratch[0, : len(block)], scratch[1, : len(block)]


def _fold_stats_(stats: Tensor, logits: Tensor, target_ids: Tensor, inverse_temperature: float, first_column: int = 0) -> None:
    """Launch `_stats_kernel` on a chunk or tile of logits, whose rows are contiguous."""
    num_rows, num_columns = logits.shape
    sizes = (num_rows, first_column, num_columns, inverse_temperature * LOG2E.value)
    launch(_stats_kernel, (num_rows,), logits, logits.stride(0), target_ids.contiguous(), stats, *sizes, **STATS_CONSTANTS)


def _finish_stats_(stats: Tensor, inverse_temperature: float) -> Tensor:
    """Turn what `_stats_kernel` leaves into the rows that `row_stats` unpacks, in place."""
    chosen, entropies, maxima, sums, moments = stats.unbind()
    moments.div_(sums)
    log_sums = sums.log()
    torch.sub(log_sums, moments, out=entropies)
    chosen.sub_(maxima).mul_(inverse_temperature).sub_(log_sums)
    return stats


def _chunk_stats(logits: Tensor, target_ids: Tensor, inverse_temperature: float) -> Tensor:
    """[5, C]: what `row_stats` unpacks."""
    stats = logits.new_empty((5, len(logits)), dtype=accumulate_dtype(logits.dtype))
    if runs_triton(logits):
        _fold_stats_(stats, logits, target_ids, inverse_temperature)
        return _finish_stats_(stats, inverse_temperature)
    for rows, block, z, e in _blocks(logits):
        logprobs, entropies, maxima, sums, means = stats[:, rows].unbind()
        target = block.gather(1, target_ids[rows, None]).to(z.dtype)
        torch.amax(block, 1, out=maxima) if block.dtype == maxima.dtype else maxima.copy_(block.amax(1))
        torch.sub(block, maxima[:, None], out=z)
        if inverse_temperature != 1.0:
            z.mul_(inverse_temperature)
        # exp(-1000) is 0 in fp64, too; without the floor a logit of -inf would make 0 * -inf
        torch.exp(z.clamp_(min=-1000.0), out=e)
        torch.sum(e, 1, out=sums)
        torch.sum(e.mul_(z), 1, out=means)
        means.div_(sums)
        log_sums = sums.log()
        torch.sub(log_sums, means, out=entropies)
        torch.sub((target[:, 0] - maxima) * inverse_temperature, log_sums, out=logprobs)
    return stats


def row_stats(logits: Tensor, target_ids: Tensor, inverse_temperature: float) -> tuple[Tensor, Tensor, SoftmaxStats]:
    """Of a chunk of logits (C, V) with contiguous rows: logp, entropy, and what its gradient needs; each (C,)."""
    logprobs, entropies, *softmax = _chunk_stats(logits, target_ids, inverse_temperature).unbind()
    return logprobs, entropies, SoftmaxStats(*softmax)


def logit_gradient_(
    logits: Tensor,
    target_ids: Tensor,
    inverse_temperature: float,
    softmax: SoftmaxStats,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None = None,
) -> None:
    """Turn a chunk of logits into the gradient of the raw logits (that of z times 1 / temperature), in place."""
    if runs_triton(logits):
        num_rows, num_columns = logits.shape
        sizes = (logits.stride(0), num_columns, inverse_temperature * LOG2E.value)
        softmax = SoftmaxStats(*(tensor.contiguous() for tensor in softmax))
        gains = (grad_logprobs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous())
        constants = {"ENTROPY": grad_entropy is not None} | GRADIENT_CONSTANTS
        launch(_gradient_kernel, (num_rows,), logits, *sizes, target_ids.contiguous(), softmax, *gains, **constants)
        return
    maxima, sums, means = softmax
    grad_logprobs = grad_logprobs * inverse_temperature
    for rows, block, z, e in _blocks(logits):
        torch.sub(block, maxima[rows, None], out=z)
        if inverse_temperature != 1.0:
            z.mul_(inverse_temperature)
        torch.exp(z.clamp_(min=-1000.0), out=e)
        gain = grad_logprobs[rows, None]
        if grad_entropy is None:
            e.mul_(-gain / sums[rows, None])
        else:
            slope = grad_entropy[rows, None] * -inverse_temperature
            e.mul_(z.sub_(means[rows, None]).mul_(slope).sub_(gain)).div_(sums[rows, None])
        block.copy_(e.scatter_add_(1, target_ids[rows, None], gain))


# Devices and dtypes that have shown to have no GEMM whose sum is wider than its factors.
_WITHOUT_WIDE_SUM: set[tuple[str, torch.dtype]] = set()


def _wide_sum(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`add_outer` in one GEMM that adds in `dtype`; None where there is no such GEMM, which is tried once."""
    kind = (left.device.type, left.dtype)
    if kind in _WITHOUT_WIDE_SUM:
        return None
    try:
        if total is None:
            return torch.mm(left.T, right, out_dtype=dtype)
        return torch.addmm(total, left.T, right, out_dtype=dtype, out=total)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, TypeError):  # TypeError: a torch without the overload
        _WITHOUT_WIDE_SUM.add(kind)
        return None


def add_outer(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right in `dtype`, added to `total` in place from the second chunk on: the first has no zeros to be written and read.

    `dtype` is fp32 for half-precision factors, or theirs where this is the only term. Where no GEMM adds half-precision products
    in fp32 (a CPU), each is rounded to half precision before it is added.
    """
    if left.dtype == dtype:
        return left.T @ right if total is None else total.addmm_(left.T, right)
    wide = _wide_sum(total, left, right, dtype)
    if wide is None:
        product = left.T @ right
        wide = product.to(dtype) if total is None else total.add_(product)
    return wide


def sum_dtype(dtype: torch.dtype, num_chunks: int) -> torch.dtype:
    """The type in which chunks' terms of dweight are added: that of `dtype` where one GEMM makes the whole sum."""
    return dtype if num_chunks == 1 else accumulate_dtype(dtype)


def weight_gradient(total: Tensor | None, weight: Tensor, needed: bool) -> Tensor:
    """What `add_outer` left, in the type of `weight`: zeros where no chunk was added, empty where none is needed."""
    return weight.new_zeros(weight.shape if needed else 0) if total is None else total.to(weight.dtype)


def tile_columns(num_rows: int, num_columns: int) -> int:
    """Columns of a tile of `num_rows` rows, aligned: short batches launch fewer and larger GEMMs."""
    return min(row_stride(num_columns), max(ROW_MULTIPLE, TILE_LOGITS // num_rows // ROW_MULTIPLE * ROW_MULTIPLE))


def in_chunks(rows: Tensor, sizes: int) -> Sequence[Tensor]:
    """`rows.split(sizes)`, and nothing (rather than one empty chunk) of no rows."""
    return rows.split(sizes) if len(rows) else ()


def _chunks(hidden: Tensor, weight: Tensor, target_ids: Tensor, chunk_rows: int) -> Sequence[Tensor]:
    """Indices of the rows that count, a chunk each."""
    return in_chunks(in_vocabulary(target_ids, weight).nonzero()[:, 0], chunk_rows or chunk_size(hidden, weight))


def _with_logits(
    chunks: Sequence[Tensor], hidden: Tensor, weight: Tensor, target_ids: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each chunk's rows, their hidden states and targets, and the buffer that holds their logits."""
    buffer = logit_buffer(hidden, len(chunks[0]) if chunks else 0, len(weight))
    for rows in chunks:
        x = hidden[rows]
        yield rows, x, target_ids[rows], torch.mm(x, weight.T, out=buffer[: len(rows)])


@custom_op("vesalius::linear_logprob", mutates_args=())
def linear_logprob_forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropies, the (3, N) statistics of the backward)."""
    output = hidden.new_zeros((5, len(hidden)), dtype=accumulate_dtype(hidden.dtype))
    if runs_triton(hidden):
        kept = in_vocabulary(target_ids, weight).nonzero()[:, 0]
        buffer = hidden.new_empty(min(TILE_LOGITS, len(kept) * row_stride(len(weight))))
        for rows in in_chunks(kept, TILE_ROWS):
            x, ids = hidden[rows], target_ids[rows]
            stats, width = output.new_empty((5, len(rows))), tile_columns(len(rows), len(weight))
            for first in range(0, len(weight), width):
                columns = weight[first : first + width]
                tile = torch.mm(x, columns.T, out=buffer[: len(rows) * width].view(-1, width)[:, : len(columns)])
                _fold_stats_(stats, tile, ids, 1 / temperature, first)
            output[:, rows] = _finish_stats_(stats, 1 / temperature)
    else:
        for rows, _, ids, logits in _with_logits(_chunks(hidden, weight, target_ids, chunk_rows), hidden, weight, target_ids):
            output[:, rows] = _chunk_stats(logits, ids, 1 / temperature)
    return output[0].clone(), output[1].clone(), output[2:].clone()


@linear_logprob_forward.register_fake
def _(hidden, weight, target_ids, temperature, chunk_rows):
    vector = hidden.new_empty(len(hidden), dtype=accumulate_dtype(hidden.dtype))
    return vector, torch.empty_like(vector), vector.new_empty((3, len(hidden)))


@custom_op("vesalius::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    stats: Tensor,
    temperature: float,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight), empty where not needed."""
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    chunks = _chunks(hidden, weight, target_ids, chunk_rows)
    grad_weight, dtype = None, sum_dtype(weight.dtype, len(chunks))
    for rows, x, ids, logits in _with_logits(chunks, hidden, weight, target_ids):
        softmax, slope = SoftmaxStats(*stats[:, rows].unbind()), None if grad_entropy is None else grad_entropy[rows]
        logit_gradient_(logits, ids, 1 / temperature, softmax, grad_logprobs[rows], slope)
        if need_hidden:
            grad_hidden[rows] = logits @ weight
        if need_weight:
            grad_weight = add_outer(grad_weight, logits, x, dtype)
    return grad_hidden, weight_gradient(grad_weight, weight, need_weight)


@linear_logprob_backward.register_fake
def _(grad_logprobs, grad_entropy, hidden, weight, target_ids, stats, temperature, chunk_rows, need_hidden, need_weight):
    return hidden.new_empty(hidden.shape if need_hidden else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target_ids, ctx.temperature, ctx.chunk_rows = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target_ids, output[2])


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _grad_stats: None) -> tuple[Tensor | None, ...]:
    hidden, weight, target_ids, stats = ctx.saved_tensors
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(stats[0])
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = linear_logprob_backward(
        grad_logprobs, grad_entropy, hidden, weight, target_ids, stats, ctx.temperature, ctx.chunk_rows, need_hidden, need_weight
    )
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None


linear_logprob_forward.register_autograd(_backward, setup_context=_setup)


def head_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`hidden` and `weight` in the dtype the head runs in: autocast's, else that of `weight`."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def linear_logprob(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, *, temperature: float = 1.0, chunk_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), each (N,) float32 and nats, of ids (N,) under softmax(hidden weight^T / temperature).

    `hidden` (N, H), `weight` (V, H), `target_ids` (N,); rows whose id is no token (-100, or anything outside 0 to V - 1) are
    skipped and give 0. Differentiable in hidden and weight through both outputs. `chunk_rows` caps the rows of logits held at once
    (0: by memory). Raises ValueError.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden and weight must be (N, H) and (V, H), not {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if target_ids.shape != hidden.shape[:1]:
        raise ValueError(f"target_ids must be {tuple(hidden.shape[:1])}, not {tuple(target_ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    hidden, weight = head_operands(hidden, weight)
    logprobs, entropy, _ = linear_logprob_forward(hidden, weight, target_ids.long(), temperature, chunk_rows)
    return logprobs, entropy
