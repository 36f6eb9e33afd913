"""Which experts each token goes to, and what comes back: the mixture of experts of GShard (arXiv:2006.16668) and Switch
(arXiv:2101.03961), as MedPLIB takes it from DeepSpeed, in plain PyTorch.

    p = softmax(x W^T)                            in float32 at least, [S, E]
    y = sum over the K likeliest e of w_e f_e(x)  w = p, or p over its sum over the experts that take the token
    balance = E sum_e mean(p_e) c_e / (S K)       c_e tokens that chose e; 1 where all are chosen alike
    z = mean(logsumexp(x W^T)^2)                  arXiv:2202.08906, equation 5

Means are over real tokens: padding goes nowhere, takes no expert's place, and gets zeros. Where an expert takes at most `capacity`
tokens, the others that chose it are dropped there, and get from it nothing.

Letters: S tokens, H width of a token, E experts, K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """Where S tokens go. `weights` has the gradient of the router; the losses are scalars, over real tokens and before drops."""

    experts: Tensor  # [S, K] int64, the likeliest first
    weights: Tensor  # [S, K] float32 or float64; zero where a token was dropped, and for padding
    slots: Tensor  # [S, K] int64, the token's place among those that the expert takes; -1 where it was dropped, and for padding
    counts: Tensor  # [E] int64, tokens that chose each expert
    balance_loss: Tensor
    z_loss: Tensor


@dataclass(frozen=True)
class RoutingOptions:
    """`capacity_factor` None: nothing is dropped; else an expert takes ceil(capacity_factor K S / E) tokens, or `min_capacity`.

    `drop`: who has to go, the latest ("position") or the least likely ("probs"). `renormalize`: a token's weights have the sum 1,
    as a pretrained FFN in each expert needs; with K = 1 the router then learns from the auxiliary losses alone.
    """

    top_k: int = 2
    capacity_factor: float | None = None
    min_capacity: int = 0
    drop: str = "position"
    renormalize: bool = True

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {self.top_k}")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor must be positive or None, not {self.capacity_factor}")
        if self.drop not in ("position", "probs"):
            raise ValueError(f"drop must be 'position' or 'probs', not {self.drop!r}")


def route(hidden: Tensor, gate_weight: Tensor, options: RoutingOptions, token_mask: Tensor | None = None) -> Routing:
    """hidden [S, H], gate_weight [E, H], token_mask [S] bool (None: all are real). Nothing waits for the device.

    Raises ValueError where there are fewer than K experts.
    """
    num_experts, top_k = gate_weight.shape[0], options.top_k
    if top_k > num_experts:
        raise ValueError(f"top_k is {top_k}, and there are {num_experts} experts")
    real = hidden.new_ones(hidden.shape[0], dtype=torch.bool) if token_mask is None else token_mask
    with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would decide otherwise between experts that are close
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(dtype) @ gate_weight.to(dtype).T
    probs = logits.softmax(-1)
    top_probs, experts = probs.topk(top_k)

    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, experts, True) & real[:, None]  # [S, E]
    num_tokens = real.sum().clamp(min=1)
    kept = chosen if options.capacity_factor is None else _within_capacity(chosen, probs, num_tokens, options)
    slots = torch.where(kept, kept.cumsum(0) - 1, -1).gather(1, experts)

    weights = top_probs * (slots >= 0)
    if options.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).eps)

    counts = chosen.sum(0)
    mean_probs = (probs * real[:, None]).sum(0) / num_tokens
    balance_loss = num_experts * (mean_probs * counts).sum() / (num_tokens * top_k)
    z_loss = (logits.logsumexp(-1).square() * real).sum() / num_tokens
    return Routing(experts, weights, slots, counts, balance_loss, z_loss)


def _within_capacity(chosen: Tensor, probs: Tensor, num_tokens: Tensor, options: RoutingOptions) -> Tensor:
    share = num_tokens * (options.capacity_factor or 0) * options.top_k / chosen.shape[1]
    capacity = share.ceil().clamp(min=options.min_capacity)
    if options.drop == "position":
        return chosen & (chosen.cumsum(0) <= capacity)
    order = torch.where(chosen, probs.detach(), -1).argsort(dim=0, descending=True, stable=True)
    return chosen & (order.argsort(0) < capacity)  # the sorting of an order is each token's rank


def moe_mlp(hidden: Tensor, routing: Routing, experts: Sequence[nn.Module] | nn.ModuleList) -> Tensor:
    """hidden [S, H] through the experts, each [n, H] -> [n, H], weighed and added in the weights' type: [S, H] in hidden's.

    Every expert runs, if on no token: its parameters then have gradients of zero, which processes that train together count on.
    """
    out = routing.weights.new_zeros(hidden.shape)
    for number, expert in enumerate(experts):
        token, choice = torch.where((routing.experts == number) & (routing.slots >= 0))
        out = out.index_add(0, token, expert(hidden[token]) * routing.weights[token, choice, None])
    return out.to(hidden.dtype)
