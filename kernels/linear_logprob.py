"""Log-probability of given tokens and entropy under a linear head, without ever holding [N, V] logits.

    z = hidden weight^T / temperature        m = max_v z     s = sum_v exp(z - m)     zbar = sum_v p (z - m)
    logp = z_y - m - log s                   entropy = log s - zbar                    p = exp(z - m) / s
    dz_v = g (1[v = y] - p_v) - h p_v (z_v - m - zbar)       g, h: incoming gradients of logp and entropy
    dhidden = dz weight / temperature        dweight = dz^T hidden / temperature

N rows (tokens), H hidden, V vocabulary. Rows are taken in chunks of C: one GEMM for the logits, then one pass over the chunk; the
backward recomputes the logits (4 GEMMs of 2 N H V FLOP in all). linear_grpo.py, which knows its loss, needs three.
Working memory: C V logits in the dtype of `hidden`, and dweight in fp32. Improves on TRL's chunked log-probs by skipping rows
and by passes over rows that stay in cache.
"""

import torch
from torch.library import custom_op

SKIP = -100
# What a chunk of logits may take on a CPU, and a block of rows that the elementwise passes keep in its L2 cache.
CPU_CHUNK_BYTES = 32 << 20
CPU_BLOCK_BYTES = 1 << 20


def linear_logprob_reference(hidden, weight, target_ids, *, temperature=1.0):
    """The specification of `linear_logprob`, differentiable by autograd in any floating dtype."""
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    keep = target_ids != SKIP
    chosen = logprobs.gather(-1, target_ids.where(keep, 0)[:, None])[:, 0]
    p = logprobs.exp()
    entropy = -torch.where(p > 0, p * logprobs, 0.0).sum(-1)
    return chosen.where(keep, 0.0), entropy.where(keep, 0.0)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Reductions run in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_size(hidden, weight) -> int:
    """Rows of logits to hold at once."""
    return max(1, CPU_CHUNK_BYTES // (weight.shape[0] * hidden.element_size()))


def _blocks(logits):
    """Row blocks of a chunk of logits that fit the cache, with an accumulation-dtype scratch of the same shape."""
    dtype = accumulate_dtype(logits.dtype)
    rows = min(len(logits), max(1, CPU_BLOCK_BYTES // (logits.shape[1] * dtype.itemsize)))
    scratch = logits.new_empty((2, rows, logits.shape[1]), dtype=dtype)
    for start in range(0, len(logits), rows):
        block = logits[start : start + rows]
        yield slice(start, start + rows), block, *scratch[:, : len(block)].unbind()


def row_stats(logits, target_ids, inverse_temperature):
    """Of a chunk of logits: logp, entropy, and the (m, s, zbar) that its gradient needs; each (C,)."""
    stats = logits.new_empty((5, len(logits)), dtype=accumulate_dtype(logits.dtype))
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
    return stats.unbind()


def logit_gradient_(logits, target_ids, inverse_temperature, stats, grad_logprobs, grad_entropy=None):
    """Turn a chunk of logits into the gradient of the raw logits (that of z times 1 / temperature), in place."""
    _, _, maxima, sums, means = stats
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


def add_outer_(total, left, right, first: bool):
    """total (+)= left^T right; `total` is fp32 for half-precision factors."""
    if left.dtype == total.dtype:
        torch.mm(left.T, right, out=total) if first else total.addmm_(left.T, right)
    elif left.is_cuda:
        torch.mm(left.T, right, out_dtype=total.dtype, out=total) if first else torch.addmm(
            total, left.T, right, out_dtype=total.dtype, out=total
        )
    else:
        total.copy_(left.T @ right) if first else total.add_(left.T @ right)


def _chunks(hidden, weight, target_ids, chunk_rows):
    """Chunks of the rows that count: their indices, hidden states, targets and a buffer that holds their logits."""
    kept = (target_ids != SKIP).nonzero()[:, 0]
    size = chunk_rows or chunk_size(hidden, weight)
    buffer = hidden.new_empty((min(size, len(kept)), len(weight)))
    for rows in kept.split(size):
        x = hidden[rows]
        yield rows, x, target_ids[rows], torch.mm(x, weight.T, out=buffer[: len(rows)])


@custom_op("vesalius::linear_logprob", mutates_args=())
def linear_logprob_forward(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float, chunk_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs, entropies, the (3, N) statistics of the backward)."""
    output = hidden.new_zeros((5, len(hidden)), dtype=accumulate_dtype(hidden.dtype))
    for rows, _, ids, logits in _chunks(hidden, weight, target_ids, chunk_rows):
        output[:, rows] = torch.stack(row_stats(logits, ids, 1 / temperature))
    return output[0].clone(), output[1].clone(), output[2:].clone()


@linear_logprob_forward.register_fake
def _(hidden, weight, target_ids, temperature, chunk_rows):
    vector = hidden.new_empty(len(hidden), dtype=accumulate_dtype(hidden.dtype))
    return vector, torch.empty_like(vector), vector.new_empty((3, len(hidden)))


@custom_op("vesalius::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dhidden, dweight), empty where not needed."""
    grad_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    total = weight.new_zeros(weight.shape if need_weight else 0, dtype=accumulate_dtype(weight.dtype))
    for rows, x, ids, logits in _chunks(hidden, weight, target_ids, chunk_rows):
        of_rows = (None, None, *stats[:, rows].unbind())
        slope = None if grad_entropy is None else grad_entropy[rows]
        logit_gradient_(logits, ids, 1 / temperature, of_rows, grad_logprobs[rows], slope)
        if need_hidden:
            grad_hidden[rows] = logits @ weight
        if need_weight:
            add_outer_(total, logits, x, first=False)
    return grad_hidden, total.to(weight.dtype)


@linear_logprob_backward.register_fake
def _(grad_logprobs, grad_entropy, hidden, weight, target_ids, stats, temperature, chunk_rows, need_hidden, need_weight):
    return torch.empty_like(hidden) if need_hidden else hidden.new_empty(0), (
        torch.empty_like(weight) if need_weight else weight.new_empty(0)
    )


def _setup(ctx, inputs, output):
    hidden, weight, target_ids, ctx.temperature, ctx.chunk_rows = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target_ids, output[2])


def _backward(ctx, grad_logprobs, grad_entropy, _grad_stats):
    hidden, weight, target_ids, stats = ctx.saved_tensors
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(stats[0])
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = linear_logprob_backward(
        grad_logprobs, grad_entropy, hidden, weight, target_ids, stats, ctx.temperature, ctx.chunk_rows, need_hidden, need_weight
    )
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None


linear_logprob_forward.register_autograd(_backward, setup_context=_setup)


def head_operands(hidden, weight):
    """`hidden` and `weight` in the dtype the head runs in: autocast's, else that of `weight`."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, *, temperature: float = 1.0, chunk_rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs, entropy), each (N,) float32 and nats, of ids (N,) under softmax(hidden weight^T / temperature).

    `hidden` (N, H), `weight` (V, H), `target_ids` (N,) int64; rows of id -100 are skipped and give 0. Differentiable in hidden
    and weight through both outputs. `chunk_rows` caps the rows of logits held at once (0: by memory). Raises ValueError.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden and weight must be (N, H) and (V, H), not {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if target_ids.shape != hidden.shape[:1]:
        raise ValueError(f"target_ids must be {tuple(hidden.shape[:1])}, not {tuple(target_ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    hidden, weight = head_operands(hidden, weight)
    logprobs, entropy, _ = linear_logprob_forward(hidden, weight, target_ids, temperature, chunk_rows)
    return logprobs, entropy
