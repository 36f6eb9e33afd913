"""What the two GRPO losses share: their settings, and the terms of one token with their derivatives, eager and in Triton.

The formulas and the letters are those of grpo_loss.py. A token's loss depends on its log-prob in two ways: on logp itself at a
fixed importance ratio r (the derivative is called `direct`), and through log r (`through`). At token level their sum is
dloss/dlogp; at sequence level `through` is first averaged over the sequence, which has one ratio.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.language import tl, triton

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
IMPORTANCE_LEVELS = ("token", "sequence")


class LossNumbers(NamedTuple):
    """What a loss computes with, once its type is resolved: edges of the ratio, cap of the unclipped ratio, weight of the KL."""

    low_edge: float
    high_edge: float
    delta: float
    beta: float


@dataclass(frozen=True)
class GRPOLoss:
    """The settings of a loss of the GRPO family, under TRL's names and with TRL's defaults.

    The ratio is clipped to [1 - epsilon, 1 + epsilon_high], where epsilon_high is epsilon unless given; for cispo epsilon_high is
    the cap of the ratio itself (about 5) and epsilon has no meaning. `delta` caps the unclipped ratio. `beta` weighs the KL to the
    reference, `use_bias_correction_kl` multiplies that KL by the ratio. dr_grpo divides by `max_completion_length`, in tokens.
    Raises ValueError naming the argument.

    `text` is the same loss as a string, for the ops: they take tensors, numbers and strings only. `of_text` reads it back. Make the
    loss outside of what torch.compile traces.
    """

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = True
    max_completion_length: int | None = None
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {self.loss_type!r}")
        if self.importance_sampling_level not in IMPORTANCE_LEVELS:
            raise ValueError(
                f"importance_sampling_level must be one of {', '.join(IMPORTANCE_LEVELS)}, not {self.importance_sampling_level!r}"
            )
        if self.loss_type == "dr_grpo" and not self.max_completion_length:
            raise ValueError("max_completion_length must be given for loss_type 'dr_grpo', which divides by it")
        # written here, not where it is used: torch.compile traces that place and cannot follow json
        object.__setattr__(self, "text", json.dumps({name: getattr(self, name) for name in self.names()}))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The settings' names."""
        return tuple(setting.name for setting in fields(cls) if setting.init)

    @staticmethod
    @lru_cache
    def of_text(text: str) -> "GRPOLoss":
        """The loss whose `text` this is."""
        return GRPOLoss(**json.loads(text))

    @property
    def is_cispo(self) -> bool:
        return self.loss_type == "cispo"

    @property
    def by_sequence(self) -> bool:
        """One ratio a sequence (GSPO) instead of one a token."""
        return self.importance_sampling_level == "sequence"

    @property
    def by_length(self) -> bool:
        """Each row's tokens are averaged before the rows are."""
        return self.loss_type == "grpo"

    @property
    def by_items(self) -> bool:
        """The sum is divided by a number of tokens, not of rows."""
        return self.loss_type in ("bnpo", "dapo", "cispo")

    @property
    def numbers(self) -> LossNumbers:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        edges = (0.0, high) if self.is_cispo else (1.0 - self.epsilon, 1.0 + high)
        delta = float("inf") if self.is_cispo or self.delta is None else self.delta
        return LossNumbers(*map(float, (*edges, delta, self.beta)))  # a kernel would take an integer for another type

    @property
    def kernel_flags(self) -> dict[str, Any]:
        """The constexprs that both Triton kernels take from the settings."""
        kl = "none" if not self.beta else "ratio" if self.use_bias_correction_kl else "plain"
        return {"CISPO": self.is_cispo, "KL": kl}

    def denominator(self, num_rows: int) -> float:
        """What divides the sum, beside the row's length (grpo) or the number of tokens (bnpo, dapo, cispo)."""
        if self.by_items:
            return 1.0
        num_rows = max(num_rows, 1)  # no row has no loss, not one that is not a number
        return float(num_rows if self.by_length else num_rows * (self.max_completion_length or 0))


class TokenInputs(NamedTuple):
    """What a loss may be given of each token beside its log-prob; None where it is not. In a kernel the same, as pointers."""

    old_logprobs: Any = None
    ref_logprobs: Any = None
    policy_mask: Any = None

    def each(self, function: Callable[[Tensor], Tensor]) -> "TokenInputs":
        """`function` of those that are given."""
        return TokenInputs(*(value if value is None else function(value) for value in self))

    def select(self, index: Any) -> "TokenInputs":
        """Those rows or tokens of what is given."""
        return self.each(lambda tensor: tensor[index])


def row_weights(mask: Tensor, num_items: Tensor | None, denominator: float, loss: GRPOLoss, dtype: torch.dtype) -> Tensor:
    """w_b of the loss, (B,): what one token of each row weighs."""
    weights = torch.full((mask.shape[0],), 1.0 / denominator, dtype=dtype, device=mask.device)
    if loss.by_length:
        weights = weights / (mask != 0).sum(-1).clamp(min=1)
    return weights if num_items is None else weights / num_items


class TokenTerms(NamedTuple):
    """Of each token: the loss, its derivatives by logp at fixed ratio and by log r, the KL term (or None) and the ratio."""

    loss: Tensor
    direct: Tensor
    through: Tensor
    kl: Tensor | None
    ratio: Tensor


def token_terms(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, given: TokenInputs, loss: GRPOLoss) -> TokenTerms:
    """The terms of every token; all arguments broadcast to (B, T)."""
    low_edge, high_edge, delta, beta = loss.numbers
    ratio = log_ratio.exp()
    if loss.is_cispo:
        direct = -ratio.clamp(max=high_edge) * advantages
        value, through = direct * logprobs, torch.zeros_like(direct)
    else:
        unclipped = ratio.clamp(max=delta) * advantages
        clipped = ratio.clamp(low_edge, high_edge) * advantages
        value = -torch.minimum(unclipped, clipped)
        outside = (ratio < low_edge) | (ratio > high_edge)
        flat = torch.where(unclipped <= clipped, ratio > delta, outside)
        through = torch.where(flat, 0.0, -ratio * advantages)
        direct = torch.zeros_like(through)
    if given.policy_mask is not None:
        value, direct, through = (x * given.policy_mask for x in (value, direct, through))
    kl = None
    if beta:
        drift = given.ref_logprobs - logprobs
        kl, slope = drift.expm1() - drift, -drift.expm1()
        if loss.use_bias_correction_kl:
            kl, slope = kl * ratio, slope * ratio
            through = through + beta * kl
        value, direct = value + beta * kl, direct + beta * slope
    return TokenTerms(value, direct, through, kl, ratio)


class LossGradient(NamedTuple):
    """(B, T) each: weighted token losses, dloss/dlogp, the KL terms (or None), and the ratios, (B, 1) at sequence level."""

    losses: Tensor
    gradient: Tensor
    kl: Tensor | None
    ratio: Tensor


def loss_gradient(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor, given: TokenInputs, loss: GRPOLoss
) -> LossGradient:
    """The eager forward of the losses: (B, T) log-probs and mask, (B,) advantages and weights. Masked tokens may hold anything."""
    keep = mask != 0
    logprobs, given = torch.where(keep, logprobs, 0.0), given.each(lambda x: torch.where(keep, x, 0.0))
    lengths = keep.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = torch.zeros_like(logprobs) if given.old_logprobs is None else logprobs - given.old_logprobs
    if loss.by_sequence:
        log_ratio = log_ratio.sum(-1, keepdim=True) / lengths
    terms = token_terms(logprobs, log_ratio, advantages[:, None], given, loss)
    weight = keep * weights[:, None]
    through = terms.through * weight
    if loss.by_sequence:
        through = keep * (through.sum(-1, keepdim=True) / lengths)
    return LossGradient(terms.loss * weight, terms.direct * weight + through, terms.kl, terms.ratio)


def check_tokens(shape: torch.Size, **tensors: Tensor | None) -> None:
    """Raise ValueError naming the first tensor that is given and not of `shape`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(tensor.shape)}")


def in_type(dtype: torch.dtype, *tensors: Tensor | None) -> Iterator[Tensor | None]:
    """The tensors in the type that the log-probs are in: a wider one beside them would widen the loss, and not its gradient."""
    return (tensor if tensor is None else tensor.to(dtype) for tensor in tensors)


def needed_reference(loss: GRPOLoss, ref_logprobs: Tensor | None) -> Tensor | None:
    """`ref_logprobs`, or None where the loss has no KL term. Raises ValueError where it has one and they are not given."""
    if loss.beta and ref_logprobs is None:
        raise ValueError("ref_logprobs must be given where beta is not 0")
    return ref_logprobs if loss.beta else None


def item_count(mask: Tensor, num_items: Tensor | float | None, loss: GRPOLoss) -> Tensor | None:
    """`num_items` as the ops take it: a 0-dim tensor where the loss divides by a number of tokens, else None. ValueError."""
    if not loss.by_items:
        return None
    if num_items is None:
        return (mask != 0).sum().clamp(min=1)
    items = torch.as_tensor(num_items, device=mask.device)
    if items.numel() != 1:
        raise ValueError(f"num_items must be one number, not {tuple(items.shape)}")
    return items.reshape(())


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
