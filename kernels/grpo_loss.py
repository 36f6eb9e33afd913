"""The GRPO family of losses from per-token log-probabilities, with its gradient and metrics, in one launch.

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

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from kernels.grpo_terms import (
    LossSettings,
    check_tokens,
    item_count,
    kl_kind,
    loss_gradient,
    loss_settings,
    row_weights,
    token_terms_kernel,
)
from kernels.launch import LaunchConfig, launch, runs_triton


def grpo_loss_reference(
    logprobs,
    advantages,
    mask,
    *,
    old_logprobs=None,
    ref_logprobs=None,
    policy_mask=None,
    loss_type="dapo",
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    beta=0.0,
    importance_sampling_level="token",
    use_bias_correction_kl=True,
    max_completion_length=None,
    num_items=None,
    num_rows=None,
):
    """The specification of the loss of `grpo_loss`, differentiable by autograd in any floating dtype."""
    mask = mask.to(logprobs.dtype)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    advantages = advantages[:, None]
    log_ratio = logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / lengths
    ratio = log_ratio.exp()
    high = epsilon if epsilon_high is None else epsilon_high
    if loss_type == "cispo":
        policy = -ratio.clamp(max=high).detach() * advantages * logprobs
    else:
        clipped = ratio.clamp(1 - epsilon, 1 + high) * advantages
        policy = -torch.min(ratio.clamp(max=delta) * advantages if delta is not None else ratio * advantages, clipped)
    loss = policy if policy_mask is None else policy * policy_mask
    if beta:
        kl = (ref_logprobs - logprobs).exp() - (ref_logprobs - logprobs) - 1
        loss = loss + beta * (kl * ratio if use_bias_correction_kl else kl)
    num_rows = num_rows or len(mask)
    if loss_type == "grpo":
        return (loss * mask / lengths).sum() / num_rows
    if loss_type == "dr_grpo":
        return (loss * mask).sum() / (num_rows * max_completion_length)
    return (loss * mask).sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)


# The metrics of one call, in the order of the op's `stats`; cispo reports its share of capped ratios as high_mean.
STATS = ("kl", "entropy", "low_mean", "high_mean", "region_mean", "low_min", "high_max")


def _stats(mask, advantages, kl, ratio, entropies, settings: LossSettings):
    keep = (mask != 0).to(ratio.dtype)
    count = keep.sum().clamp(min=1)
    ratio, advantages = ratio.clamp(max=settings.delta), advantages[:, None]
    clipped = torch.stack([(ratio < settings.low_edge) & (advantages < 0), (ratio > settings.high_edge) & (advantages > 0)])
    if settings.sequence_level:
        by_row = clipped[..., 0].to(keep.dtype)
        low, high = by_row.mean(-1)
    else:
        low, high = (clipped * keep).sum((1, 2)) / count
        by_row = (clipped * keep).sum(-1) / keep.sum(-1)
    nan, zero = torch.full_like(count, torch.nan), torch.zeros_like(count)
    low_min = torch.where(by_row[0].isnan(), torch.inf, by_row[0]).amin()
    high_max = torch.where(by_row[1].isnan(), -torch.inf, by_row[1]).amax()
    mean_kl = zero if kl is None else (kl * keep).sum() / count
    entropy = zero if entropies is None else (entropies * keep).sum() / count
    low_min, high_max = (torch.where(x.isinf(), nan, x) for x in (low_min, high_max))
    return torch.stack([mean_kl, entropy, low, high, low + high, low_min, high_max])


def metrics_of(stats, settings: LossSettings, entropy: bool) -> dict[str, torch.Tensor]:
    """The op's `stats` under TRL's names, 0-dim tensors on the device."""
    values = dict(zip(STATS, stats.unbind(), strict=True))
    metrics = {"entropy": values["entropy"]} if entropy else {}
    if settings.beta:
        metrics["kl"] = values["kl"]
    if settings.cispo:
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
    CISPO: tl.constexpr, SEQUENCE: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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


def _constants(num_tokens: int, settings: LossSettings) -> dict:
    block = min(1024, max(256, triton.next_power_of_2(num_tokens)))
    flags = {"CISPO": settings.cispo, "SEQUENCE": settings.sequence_level, "KL": kl_kind(settings)}
    # one token a thread: with more, ptxas spills a few bytes to fit more programs than there are
    return flags | {"BLOCK": block, "num_warps": block // 32}


def launch_configs():
    """[32, 1024] off-policy with KL and without, at both levels, and cispo; a batch of short answers on-policy."""
    vector, flags = torch.empty(0, device="meta"), torch.empty(0, dtype=torch.int64, device="meta")
    count = torch.empty(0, dtype=torch.int32, device="meta")
    outputs = (vector, vector, count, vector, vector)
    for name, loss_type, tokens, beta, level in (
        ("token level, KL", "grpo", 1024, 0.04, "token"),
        ("token level", "grpo", 1024, 0.0, "token"),
        ("sequence level, KL", "grpo", 1024, 0.04, "sequence"),
        ("sequence level", "grpo", 1024, 0.0, "sequence"),
        ("cispo", "cispo", 1024, 0.0, "token"),
        ("on-policy", "dapo", 200, 0.0, "token"),
    ):
        settings = loss_settings(32, loss_type, 0.2, 0.28, None, beta, level, True, None)
        old, ref = None if name == "on-policy" else vector, vector if beta else None
        inputs = (vector, vector, flags, old, ref, None, vector, None if loss_type == "grpo" else vector)
        numbers = (32, tokens, *settings[:5], int(settings.by_length))
        yield LaunchConfig(f"grpo loss, {name}", _loss_kernel, (*inputs, *outputs, *numbers), _constants(tokens, settings))


@triton_op("vesalius::grpo_loss", mutates_args=())
def grpo_loss_forward(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    policy_mask: torch.Tensor | None,
    entropies: torch.Tensor | None,
    num_items: torch.Tensor | None,
    low_edge: float,
    high_edge: float,
    delta: float,
    beta: float,
    denominator: float,
    cispo: bool,
    sequence_level: bool,
    by_length: bool,
    bias_correction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    settings = LossSettings(low_edge, high_edge, delta, beta, denominator, cispo, sequence_level, by_length, bias_correction)
    if runs_triton(logprobs):
        if sequence_level and old_logprobs is None:
            old_logprobs = logprobs
        inputs = (logprobs, advantages, mask, old_logprobs, ref_logprobs, policy_mask, entropies, num_items)
        num_rows, num_tokens = logprobs.shape
        gradient, partials = logprobs.new_empty(logprobs.shape), logprobs.new_empty((num_rows, PARTIALS.value))
        loss, stats = logprobs.new_empty(()), logprobs.new_empty(len(STATS))
        counter = torch.zeros((), dtype=torch.int32, device=logprobs.device)
        inputs = (x if x is None else x.contiguous() for x in inputs)
        outputs = (gradient, partials, counter, loss, stats)
        numbers = (num_rows, num_tokens, *settings[:5], int(by_length))
        launch(_loss_kernel, (num_rows,), *inputs, *outputs, *numbers, **_constants(num_tokens, settings))
        return loss, gradient, stats
    weights = row_weights(mask, num_items, settings, logprobs.dtype)
    loss, gradient, kl, ratio = loss_gradient(
        logprobs, advantages, mask, weights, old_logprobs, ref_logprobs, policy_mask, settings
    )
    return loss.sum(), gradient, _stats(mask, advantages, kl, ratio, entropies, settings)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_loss, _grad_gradient, _grad_stats):
    (gradient,) = ctx.saved_tensors
    return (None if grad_loss is None else grad_loss * gradient, *[None] * 16)


grpo_loss_forward.register_autograd(_backward, setup_context=_setup)


def grpo_loss(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    policy_mask: torch.Tensor | None = None,
    entropies: torch.Tensor | None = None,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = True,
    max_completion_length: int | None = None,
    num_items: torch.Tensor | float | None = None,
    num_rows: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (0-dim, differentiable in `logprobs`) and metrics (0-dim tensors under TRL's names) of (B, T) log-probs, nats.

    `advantages` (B,), `mask` (B, T) nonzero at the tokens that count. Without `old_logprobs` the ratio is 1 (on-policy).
    `policy_mask` (B, T) weighs the policy term and not the KL: entropy or off-policy masks. `entropies` (B, T) only feed the
    metric. `num_items` divides bnpo, dapo and cispo (the batch's tokens over all processes / number of processes; by default
    the tokens of `mask`), `num_rows` divides grpo and dr_grpo (by default B): larger than B where rows of zero gradient were
    left out. Raises ValueError naming the argument. Formulas: grpo_systems.md 8.1.
    """
    settings = loss_settings(
        num_rows or logprobs.shape[0],
        loss_type,
        epsilon,
        epsilon_high,
        delta,
        beta,
        importance_sampling_level,
        use_bias_correction_kl,
        max_completion_length,
    )
    if beta and ref_logprobs is None:
        raise ValueError("ref_logprobs must be given where beta is not 0")
    check_tokens(logprobs.shape, mask=mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, policy_mask=policy_mask)
    check_tokens(logprobs.shape, entropies=entropies)
    check_tokens(logprobs.shape[:1], advantages=advantages)
    ref_logprobs = ref_logprobs if beta else None
    items = item_count(mask, num_items, loss_type)
    loss, _, stats = grpo_loss_forward(
        logprobs, advantages, mask, old_logprobs, ref_logprobs, policy_mask, entropies, items, *settings
    )
    return loss, metrics_of(stats, settings, entropies is not None)
