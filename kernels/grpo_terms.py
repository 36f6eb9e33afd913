"""What the two GRPO losses share: their settings, and the terms of one token with their derivatives, eager and in Triton.

The formulas and the letters are those of grpo_loss.py. A token's loss has two derivatives, one at fixed importance ratio
(`direct`) and one through the logarithm of the ratio (`through`): at token level their sum is dloss/dlogp, at sequence level
`through` is first averaged over the sequence.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
IMPORTANCE_LEVELS = ("token", "sequence")


class LossSettings(NamedTuple):
    """The loss as the ops take it: the flags and numbers that remain once the loss type is resolved."""

    low_edge: float
    high_edge: float
    delta: float
    beta: float
    denominator: float
    cispo: bool
    sequence_level: bool
    by_length: bool
    bias_correction: bool


def loss_settings(
    num_rows,
    loss_type,
    epsilon,
    epsilon_high,
    delta,
    beta,
    importance_sampling_level,
    use_bias_correction_kl,
    max_completion_length,
) -> LossSettings:
    """Check the settings of `grpo_loss` and resolve them: edges of the ratio, and what divides the sum beside `num_items`."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {loss_type!r}")
    if importance_sampling_level not in IMPORTANCE_LEVELS:
        raise ValueError(
            f"importance_sampling_level must be one of {', '.join(IMPORTANCE_LEVELS)}, not {importance_sampling_level!r}"
        )
    if loss_type == "dr_grpo" and not max_completion_length:
        raise ValueError("max_completion_length must be given for loss_type 'dr_grpo', which divides by it")
    cispo = loss_type == "cispo"
    high = epsilon if epsilon_high is None else epsilon_high
    return LossSettings(
        low_edge=0.0 if cispo else 1.0 - epsilon,
        high_edge=high if cispo else 1.0 + high,
        delta=float("inf") if cispo or delta is None else delta,
        beta=beta,
        denominator={"grpo": num_rows, "dr_grpo": num_rows * (max_completion_length or 0)}.get(loss_type, 1.0),
        cispo=cispo,
        sequence_level=importance_sampling_level == "sequence",
        by_length=loss_type == "grpo",
        bias_correction=use_bias_correction_kl,
    )


def row_weights(mask, num_items, settings: LossSettings, dtype):
    """w_b of the loss, (B,): what one token of each row weighs."""
    weights = torch.full((mask.shape[0],), 1.0 / settings.denominator, dtype=dtype, device=mask.device)
    if settings.by_length:
        weights = weights / (mask != 0).sum(-1).clamp(min=1)
    return weights if num_items is None else weights / num_items


def token_terms(logprobs, log_ratio, advantages, ref_logprobs, policy_mask, settings: LossSettings):
    """Per token: the loss, its derivatives by logp at fixed ratio and by log r, the KL term and the ratio."""
    ratio = log_ratio.exp()
    if settings.cispo:
        direct = -ratio.clamp(max=settings.high_edge) * advantages
        loss, through = direct * logprobs, torch.zeros_like(direct)
    else:
        unclipped = ratio.clamp(max=settings.delta) * advantages
        clipped = ratio.clamp(settings.low_edge, settings.high_edge) * advantages
        loss = -torch.minimum(unclipped, clipped)
        outside = (ratio < settings.low_edge) | (ratio > settings.high_edge)
        flat = torch.where(unclipped <= clipped, ratio > settings.delta, outside)
        through = torch.where(flat, 0.0, -ratio * advantages)
        direct = torch.zeros_like(through)
    if policy_mask is not None:
        loss, direct, through = loss * policy_mask, direct * policy_mask, through * policy_mask
    kl = None
    if settings.beta:
        drift = ref_logprobs - logprobs
        kl, slope = drift.expm1() - drift, -drift.expm1()
        if settings.bias_correction:
            kl, slope = kl * ratio, slope * ratio
            through = through + settings.beta * kl
        loss, direct = loss + settings.beta * kl, direct + settings.beta * slope
    return loss, direct, through, kl, ratio


def loss_gradient(logprobs, advantages, mask, weights, old_logprobs, ref_logprobs, policy_mask, settings: LossSettings):
    """Eager forward of the op, (B, T): weighted token losses, dloss/dlogp, the KL terms and the ratios ((B, 1) sequence level)."""
    keep = mask != 0
    masked = [x if x is None else torch.where(keep, x, 0.0) for x in (logprobs, old_logprobs, ref_logprobs, policy_mask)]
    logprobs, old_logprobs, ref_logprobs, policy_mask = masked
    lengths = keep.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = torch.zeros_like(logprobs) if old_logprobs is None else logprobs - old_logprobs
    if settings.sequence_level:
        log_ratio = log_ratio.sum(-1, keepdim=True) / lengths
    terms = token_terms(logprobs, log_ratio, advantages[:, None], ref_logprobs, policy_mask, settings)
    loss, direct, through, kl, ratio = terms
    weight = keep * weights[:, None]
    through = through * weight
    if settings.sequence_level:
        through = keep * (through.sum(-1, keepdim=True) / lengths)
    return loss * weight, direct * weight + through, kl, ratio


def kl_kind(settings: LossSettings) -> str:
    """How the kernels take the KL term."""
    return "none" if not settings.beta else "ratio" if settings.bias_correction else "plain"


def check_tokens(shape, **tensors):
    """Raise ValueError naming the first tensor that is given and not of `shape`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(tensor.shape)}")


def item_count(mask, num_items, loss_type):
    """`num_items` as the ops take it: a 0-dim tensor where the loss type divides by a token count, else None."""
    if loss_type in ("grpo", "dr_grpo"):
        return None
    return mask.sum().clamp(min=1) if num_items is None else torch.as_tensor(num_items, device=mask.device)


@triton.jit
def token_terms_kernel(
    logprob, log_ratio, advantage, ref, policy, low_edge, high_edge, delta, beta, CISPO: tl.constexpr, KL: tl.constexpr
):
    """`token_terms` with KL "none", "plain" or "ratio" (times the importance ratio); a NaN passes."""
    NAN: tl.constexpr = tl.PropagateNan.ALL
    ratio = tl.exp(log_ratio)
    direct, through, kl = 0.0, 0.0, 0.0
    if CISPO:
        direct = -tl.minimum(ratio, high_edge, propagate_nan=NAN) * advantage * policy
        loss = direct * logprob
    else:
        unclipped = tl.minimum(ratio, delta, propagate_nan=NAN) * advantage
        clipped = tl.minimum(tl.maximum(ratio, low_edge, propagate_nan=NAN), high_edge, propagate_nan=NAN) * advantage
        loss = -tl.minimum(unclipped, clipped, propagate_nan=NAN) * policy
        outside = (ratio < low_edge) | (ratio > high_edge)
        flat = ((unclipped <= clipped) & (ratio > delta)) | ((unclipped > clipped) & outside)
        through = tl.where(flat, 0.0, -ratio * advantage * policy)
    if KL != "none":
        drift = ref - logprob
        kl = tl.exp(drift) - drift - 1.0
        slope = 1.0 - tl.exp(drift)
        if KL == "ratio":
            kl = kl * ratio
            slope = slope * ratio
            through += beta * kl
        loss += beta * kl
        direct += beta * slope
    return loss, direct, through, kl, ratio
