"""The GRPO family of losses from per-token log-probabilities, with its gradient and metrics, in one kernel (and a memset).

    r_t   = exp(logp_t - old_t)                     sequence level: r = exp(mean_t(logp_t - old_t)) for every token of the row
    pol_t = -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)       cispo: -min(r, epsilon_high).detach() A logp_t
    kl_t  = exp(ref_t - logp_t) - (ref_t - logp_t) - 1                            times r with use_bias_correction_kl
    loss  = sum_bt mask w_b (policy_mask pol_t + beta kl_t)
    w_b   = 1 / (num_rows sum_t mask)  grpo;   1 / (num_rows max_completion_length)  dr_grpo;   1 / num_items  bnpo, dapo, cispo

The gradient needs no second look at the model: with d_t the derivative at fixed ratio and q_t that through log r,
    dloss/dlogp_t = mask w (d_t + q_t)              sequence level: mask (w d_t + sum_s(mask w q_s) / sum_s(mask))
so the forward writes it and the backward only scales it.

B rows (completions), T tokens. 4 bytes a tensor and token: 0.7 MB for [32, 1024] with old and reference log-probs. Improves on
TRL's eager loss (dozens of launches) and on Liger's, which starts from materialised logits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.grpo_terms import (
    GRPOLoss,
    LossGradient,
    TokenInputs,
    check_tokens,
    in_type,
    item_count,
    loss_gradient,
    needed_reference,
    row_weights,
    token_terms_kernel,
)
from kernels.language import tl, triton
from kernels.launch import LaunchConfig, launch, padded_power, runs_triton, triton_op


def grpo_loss_reference(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: GRPOLoss,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    policy_mask: Tensor | None = None,
    num_items: Tensor | float | None = None,
    num_rows: int | None = None,
) -> Tensor:
    """The specification of the loss of `grpo_loss`, differentiable by autograd in any floating dtype."""
    mask = (mask != 0).to(logprobs.dtype)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    advantages = advantages[:, None]
    log_ratio = logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)
    if loss.importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / lengths
    ratio = log_ratio.exp()
    high = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    if loss.loss_type == "cispo":
        terms = -ratio.clamp(max=high).detach() * advantages * logprobs
    else:
        clipped = ratio.clamp(1 - loss.epsilon, 1 + high) * advantages
        terms = -torch.min(ratio.clamp(max=loss.delta) * advantages if loss.delta is not None else ratio * advantages, clipped)
    terms = terms if policy_mask is None else terms * policy_mask
    if (ref := needed_reference(loss, ref_logprobs)) is not None:
        kl = (ref - logprobs).exp() - (ref - logprobs) - 1
        terms = terms + loss.beta * (kl * ratio if loss.use_bias_correction_kl else kl)
    num_rows = max(num_rows or len(mask), 1)
    if loss.loss_type == "grpo":
        return (terms * mask / lengths).sum() / num_rows
    if loss.loss_type == "dr_grpo":
        return (terms * mask).sum() / (num_rows * (loss.max_completion_length or 0))
    return (terms * mask).sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)


# The metrics of one call, in the order of the op's `stats`; cispo reports its share of capped ratios as high_mean.
STATS = ("kl", "entropy", "low_mean", "high_mean", "region_mean", "low_min", "high_max")


def _stats(mask: Tensor, advantages: Tensor, entropies: Tensor | None, terms: LossGradient, loss: GRPOLoss) -> Tensor:
    keep, numbers = (mask != 0).to(terms.ratio.dtype), loss.numbers
    count = keep.sum().clamp(min=1)
    ratio, advantages = terms.ratio.clamp(max=numbers.delta), advantages[:, None]
    clipped = torch.stack([(ratio < numbers.low_edge) & (advantages < 0), (ratio > numbers.high_edge) & (advantages > 0)])
    if loss.by_sequence:
        by_row = clipped[..., 0].to(keep.dtype)
        low, high = by_row.mean(-1)
    else:
        low, high = (clipped * keep).sum((1, 2)) / count
        by_row = (clipped * keep).sum(-1) / keep.sum(-1)
    nan, zero = torch.full_like(count, torch.nan), torch.zeros_like(count)
    low_min = torch.where(by_row[0].isnan(), torch.inf, by_row[0]).amin()
    high_max = torch.where(by_row[1].isnan(), -torch.inf, by_row[1]).amax()
    mean_kl = zero if terms.kl is None else (terms.kl * keep).sum() / count
    entropy = zero if entropies is None else (entropies * keep).sum() / count
    low_min, high_max = (torch.where(x.isinf(), nan, x) for x in (low_min, high_max))
    return torch.stack([mean_kl, entropy, low, high, low + high, low_min, high_max])


def metrics_of(stats: Tensor, loss: GRPOLoss, entropy: bool) -> dict[str, Tensor]:
    """The op's `stats` under TRL's names, 0-dim tensors on the device."""
    values = dict(zip(STATS, stats.unbind(), strict=True))
    metrics = {"entropy": values["entropy"]} if entropy else {}
    if loss.beta:
        metrics["kl"] = values["kl"]
    if loss.is_cispo:
        return metrics | {"cispo_clip_ratio": values["high_mean"]}
    return metrics | {f"clip_ratio/{name}": values[name] for name in STATS[2:]}


@triton.jit
def _load(pointer, first, offsets, inside, keep, default):
    """What `pointer` holds from `first` on where `keep`, and `default` elsewhere or where there is no tensor."""
    if pointer is None:
        value = tl.where(keep, default, default)
    else:
        value = tl.where(keep, tl.load(pointer + first + offsets, mask=inside, other=0.0).to(tl.float32), default)
    return value


@triton.jit
def _is_clipped(ratio, advantage, low_edge, high_edge, delta):
    """1.0 where the ratio is beyond the edge that its advantage pushes to, else 0.0."""
    ratio = tl.minimum(ratio, delta)
    low, high = (ratio < low_edge).to(tl.float32), (ratio > high_edge).to(tl.float32)
    return tl.where(advantage < 0, low, tl.where(advantage > 0, high, 0.0))


@triton.jit
def _pick(vector, column, index: tl.constexpr):
    return tl.sum(tl.where(column == index, vector, 0.0), 0)


# Columns of the partial sums that a program leaves for the last one: loss, KL, entropy, clipped low and high, tokens, what the
# clipped ones are counted among, and the row's shares of clipped ones (infinite for an empty row).
PARTIALS = tl.constexpr(16)


@triton.jit
def _loss_kernel(
    logprobs, advantages, mask, old_logprobs, ref_logprobs, policy_mask, entropies, num_items,
    gradient, partials, counter, loss, stats,
    num_rows, num_tokens, low_edge, high_edge, delta, beta, denominator, by_length,
    CISPO: tl.constexpr, KL: tl.constexpr, SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One row (completion). No tuples, which torch.compile does not take: low_edge to beta are the fields of LossNumbers, in order
    row = tl.program_id(0)
    first = row.to(tl.int64) * num_tokens
    advantage = tl.load(advantages + row).to(tl.float32)
    columns = tl.arange(0, BLOCK)

    # length of the row and its mean log-ratio
    length, log_ratio_sum = 0.0, 0.0
    for start in range(0, num_tokens, BLOCK):
        offsets = start + columns
        inside = offsets < num_tokens
        keep = tl.load(mask + first + offsets, mask=inside, other=0) != 0
        length += tl.sum(keep.to(tl.float32), 0)
        if SEQUENCE and old_logprobs is not None:
            log_ratio = _load(logprobs, first, offsets, inside, keep, 0.0) - _load(old_logprobs, first, offsets, inside, keep, 0.0)
            log_ratio_sum += tl.sum(log_ratio, 0)
    mean_log_ratio = log_ratio_sum / tl.maximum(length, 1.0)
    weight = 1.0 / denominator
    if by_length:
        weight = weight / tl.maximum(length, 1.0)
    if num_items is not None:
        weight = weight / tl.load(num_items).to(tl.float32)

    # per token terms; the gradient is final at token level, and lacks the sequence's ratio at sequence level
    loss_sum, kl_sum, entropy_sum, clipped, through_sum = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, num_tokens, BLOCK):
        offsets = start + columns
        inside = offsets < num_tokens
        keep = tl.load(mask + first + offsets, mask=inside, other=0) != 0
        logprob = _load(logprobs, first, offsets, inside, keep, 0.0)
        log_ratio = tl.zeros([BLOCK], tl.float32)
        if SEQUENCE:
            log_ratio += mean_log_ratio
        elif old_logprobs is not None:
            log_ratio = logprob - _load(old_logprobs, first, offsets, inside, keep, 0.0)
        ref = _load(ref_logprobs, first, offsets, inside, keep, 0.0)
        policy = _load(policy_mask, first, offsets, inside, keep, 1.0)
        token, direct, through, kl, ratio = token_terms_kernel(
            logprob, log_ratio, advantage, ref, policy, low_edge, high_edge, delta, beta, CISPO, KL
        )
        loss_sum += tl.sum(tl.where(keep, token, 0.0), 0)
        if KL != "none":
            kl_sum += tl.sum(tl.where(keep, kl, 0.0), 0)
        if entropies is not None:
            entropy_sum += tl.sum(_load(entropies, first, offsets, inside, keep, 0.0), 0)
        if SEQUENCE:
            through_sum += tl.sum(tl.where(keep, through, 0.0), 0)
            tl.store(gradient + first + offsets, tl.where(keep, direct, 0.0), mask=inside)
        else:
            clipped += tl.sum(tl.where(keep, _is_clipped(ratio, advantage, low_edge, high_edge, delta), 0.0), 0)
            tl.store(gradient + first + offsets, tl.where(keep, weight * (direct + through), 0.0), mask=inside)
    among = length
    if SEQUENCE:
        # one ratio a sequence, also where every token is masked
        clipped = _is_clipped(tl.exp(mean_log_ratio), advantage, low_edge, high_edge, delta)
        among = tl.full([], 1.0, tl.float32)
    # a row's advantage has one sign: its tokens are clipped low or clipped high
    low = tl.where(advantage < 0, clipped, 0.0)
    high = clipped - low
    mine = partials + row * PARTIALS
    tl.store(mine, weight * loss_sum)
    tl.store(mine + 1, kl_sum)
    tl.store(mine + 2, entropy_sum)
    tl.store(mine + 3, low)
    tl.store(mine + 4, high)
    tl.store(mine + 5, length)
    tl.store(mine + 6, among)
    tl.store(mine + 7, tl.where(among > 0, low / among, float("inf")))
    tl.store(mine + 8, tl.where(among > 0, high / among, float("-inf")))
    if SEQUENCE:
        shared = through_sum / tl.maximum(length, 1.0)
        for start in range(0, num_tokens, BLOCK):
            offsets = start + columns
            inside = offsets < num_tokens
            keep = tl.load(mask + first + offsets, mask=inside, other=0) != 0
            direct = tl.load(gradient + first + offsets, mask=inside, other=0.0)
            tl.store(gradient + first + offsets, tl.where(keep, weight * (direct + shared), 0.0), mask=inside)

    # the program that finishes last adds up all rows in their order: same inputs, same bits
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) == num_rows - 1:
        column = tl.arange(0, PARTIALS)
        sums = tl.zeros([PARTIALS], tl.float32)
        lowest, highest = sums + float("inf"), sums - float("inf")
        for start in range(0, num_rows, 32):
            rows = start + tl.arange(0, 32)[:, None]
            inside = rows < num_rows
            tile = tl.load(partials + rows * PARTIALS + column[None, :], mask=inside, other=0.0, cache_modifier=".cg")
            sums += tl.sum(tile, 0)
            lowest = tl.minimum(lowest, tl.min(tl.where(inside, tile, float("inf")), 0))
            highest = tl.maximum(highest, tl.max(tl.where(inside, tile, float("-inf")), 0))
        tokens, among = tl.maximum(_pick(sums, column, 5), 1.0), tl.maximum(_pick(sums, column, 6), 1.0)
        low, high = _pick(sums, column, 3) / among, _pick(sums, column, 4) / among
        low_min, high_max = _pick(lowest, column, 7), _pick(highest, column, 8)
        tl.store(loss, _pick(sums, column, 0))
        tl.store(stats, _pick(sums, column, 1) / tokens)
        tl.store(stats + 1, _pick(sums, column, 2) / tokens)
        tl.store(stats + 2, low)
        tl.store(stats + 3, high)
        tl.store(stats + 4, low + high)
        tl.store(stats + 5, tl.where(low_min == float("inf"), float("nan"), low_min))
        tl.store(stats + 6, tl.where(high_max == float("-inf"), float("nan"), high_max))


def _constants(num_tokens: int, loss: GRPOLoss) -> dict[str, Any]:
    block = max(256, padded_power(num_tokens, 1024))
    # one token a thread: with more, ptxas spills a few bytes to fit more programs than there are
    return loss.kernel_flags | {"SEQUENCE": loss.by_sequence, "BLOCK": block, "num_warps": block // 32}


def launch_configs() -> Iterator[LaunchConfig]:
    """[32, 1024] off-policy with KL and without, at both levels, and cispo; a batch of short answers on-policy."""
    vector, flags = torch.empty(0, device="meta"), torch.empty(0, dtype=torch.int64, device="meta")
    count = torch.empty(0, dtype=torch.int32, device="meta")
    outputs = (vector, vector, count, vector, vector)
    for name, tokens, loss in (
        ("token level, KL", 1024, GRPOLoss("grpo", epsilon_high=0.28, beta=0.04)),
        ("token level", 1024, GRPOLoss("grpo", epsilon_high=0.28)),
        ("sequence level, KL", 1024, GRPOLoss("grpo", epsilon_high=0.28, beta=0.04, importance_sampling_level="sequence")),
        ("sequence level", 1024, GRPOLoss("grpo", epsilon_high=0.28, importance_sampling_level="sequence")),
        ("cispo", 1024, GRPOLoss("cispo", epsilon_high=0.28)),
        ("on-policy", 200, GRPOLoss("dapo", epsilon_high=0.28)),
    ):
        old, ref = None if name == "on-policy" else vector, vector if loss.beta else None
        inputs = (vector, vector, flags, old, ref, None, vector, vector if loss.by_items else None)
        numbers = (32, tokens, *loss.numbers, loss.denominator(32), int(loss.by_length))
        yield LaunchConfig(f"grpo loss, {name}", _loss_kernel, (*inputs, *outputs, *numbers), _constants(tokens, loss))


@triton_op("vesalius::grpo_loss")
def grpo_loss_forward(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    policy_mask: Tensor | None,
    entropies: Tensor | None,
    num_items: Tensor | None,
    denominator: float,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss/dlogp, stats) of the GRPOLoss whose `text` is `loss`."""
    settings, given = GRPOLoss.of_text(loss), TokenInputs(old_logprobs, ref_logprobs, policy_mask)
    if not logprobs.numel():  # no token: no loss, and nothing to take the least or most of
        stats = logprobs.new_zeros(len(STATS))
        stats[5:] = torch.nan
        return logprobs.new_zeros(()), torch.zeros_like(logprobs), stats
    if not runs_triton(logprobs):
        weights = row_weights(mask, num_items, denominator, settings, logprobs.dtype)
        terms = loss_gradient(logprobs, advantages, mask, weights, given, settings)
        return terms.losses.sum(), terms.gradient, _stats(mask, advantages, entropies, terms, settings)
    if settings.by_sequence and old_logprobs is None:
        given = given._replace(old_logprobs=logprobs)
    num_rows, num_tokens = logprobs.shape
    gradient, partials = logprobs.new_empty(logprobs.shape), logprobs.new_empty((num_rows, PARTIALS.value))
    value, stats = logprobs.new_empty(()), logprobs.new_empty(len(STATS))
    # A counter kept from call to call, which the last program sets back, would save the memset, but only where nothing captures or
    # traces: a graph is replayed beside other launches of its stream's counter, and a traced body would hold the tensor as a
    # constant. Nor is it safe elsewhere: made while CUDA graphs warm up it lies in their pool, whose later graphs write over it,
    # and the loss is then left unwritten without a word.
    counter = torch.zeros((), dtype=torch.int32, device=logprobs.device)
    inputs = [x if x is None else x.contiguous() for x in (logprobs, advantages, mask, *given, entropies, num_items)]
    outputs = (gradient, partials, counter, value, stats)
    numbers = (num_rows, num_tokens, *settings.numbers, denominator, int(settings.by_length))
    launch(_loss_kernel, (num_rows,), *inputs, *outputs, *numbers, **_constants(num_tokens, settings))
    return value, gradient, stats


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.num_inputs = len(inputs)


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (None if grad_loss is None else grad_loss * gradient, *[None] * (ctx.num_inputs - 1))


grpo_loss_forward.register_autograd(_backward, setup_context=_setup)


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: GRPOLoss,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    policy_mask: Tensor | None = None,
    entropies: Tensor | None = None,
    num_items: Tensor | float | None = None,
    num_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (0-dim, differentiable in `logprobs`) and metrics (0-dim tensors under TRL's names) of (B, T) log-probs, nats.

    `advantages` (B,), `mask` (B, T) nonzero at the tokens that count. Without `old_logprobs` the ratio is 1 (on-policy).
    `policy_mask` (B, T) weighs the policy term and not the KL: entropy or off-policy masks. `entropies` (B, T) only feed the
    metric. `num_items` divides bnpo, dapo and cispo: the batch's tokens over all processes / number of processes, by default
    the tokens of `mask`. `num_rows` divides grpo and dr_grpo: by default B, more where rows of zero gradient were left out.
    Computed in the type of the log-probs, float32 where that is a half one; no row or no token has a loss of 0. Raises ValueError
    naming the argument. The formulas are at the top of this file.
    """
    if logprobs.dtype in (torch.float16, torch.bfloat16):
        logprobs = logprobs.float()
    ref_logprobs = needed_reference(loss, ref_logprobs)
    check_tokens(logprobs.shape, mask=mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, policy_mask=policy_mask)
    check_tokens(logprobs.shape, entropies=entropies)
    check_tokens(logprobs.shape[:1], advantages=advantages)
    advantages = advantages.to(logprobs.dtype)
    given = in_type(logprobs.dtype, old_logprobs, ref_logprobs, policy_mask, entropies)
    items, denominator = item_count(mask, num_items, loss), loss.denominator(num_rows or logprobs.shape[0])
    value, _, stats = grpo_loss_forward(logprobs, advantages, mask, *given, items, denominator, loss.text)
    return value, metrics_of(stats, loss, entropies is not None)
