"""What a router decides, and the specification by which it does: plain PyTorch, in any floating type, differentiable by autograd.

    p = softmax(x W^T)    e_1 .. e_K the largest of p, the first of equals    w_k = p_k, or p_k / sum_kept p    (0 where not kept)
    balance = E sum_e mean_s(p_e) f_e    z = mean_s(logsumexp(x W^T)^2)        f_e: the share of choices that fell on e before drops

S tokens, H hidden, E experts, K choices of a token. The kept choices of an expert stand in rows of their own, in the order of
tokens: `slots` says in which row a choice stands, `order` which choice stands in a row. moe_router.py has the kernels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1.1920929e-7  # the least that weights are renormalised by, DeepSpeed's: float32's rounding
SMALLEST = torch.finfo(torch.float32).min


class Routing(NamedTuple):
    """Where S tokens go. Indices are int32; weights, losses and logits float32, or float64 where the tokens are.

    weights (S, K), 0 where not kept; experts (S, K), -1 for padding; slots (S, K), the row of each choice in the dispatched order,
    -1 where not kept; order (S K,), the choice s K + k in each row, -1 past the last; counts (E,) of choices before drops; ends
    (E,), the row past each expert's last; balance_loss, 1 when balanced, and z_loss, scalars; logits (S, E), without gradient.
    """

    weights: Tensor
    experts: Tensor
    slots: Tensor
    order: Tensor
    counts: Tensor
    ends: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    logits: Tensor


def route_reference(
    hidden: Tensor,
    gate_weight: Tensor | None,
    top_k: int,
    *,
    mask: Tensor | None = None,
    renormalize: bool | None = None,
    capacity_factor: float | None = None,
    min_capacity: int = 0,
    priority: Tensor | str | None = None,
    gshard: bool = False,
) -> Routing:
    """The specification of `moe_router.route`, with its arguments."""
    num_experts = hidden.shape[1] if gate_weight is None else len(gate_weight)
    capacity = expert_capacity(len(hidden), num_experts, top_k, capacity_factor, min_capacity)
    renormalize = top_k > 1 if renormalize is None else renormalize
    return route_eager(hidden, gate_weight, mask, priority, top_k, capacity, renormalize, gshard)[0]


def route_eager(
    hidden: Tensor,
    gate_weight: Tensor | None,
    mask: Tensor | None,
    priority: Tensor | str | None,
    top_k: int,
    capacity: int,
    renormalize: bool,
    gshard: bool,
) -> tuple[Routing, Tensor]:
    """The Routing, and the counts (E,) that its balance loss takes: of all choices, or with `gshard` of first ones."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype, copy=True) if gate_weight is None else hidden.to(dtype) @ gate_weight.to(dtype).T
    E, probs = logits.shape[1], logits.softmax(-1)
    routed = torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else mask.bool()
    experts = choose(logits.detach(), top_k).where(routed[:, None], -1)
    slots, order, counts, ends = place(experts, E, capacity, probs.detach() if isinstance(priority, str) else priority, gshard)
    weights = weigh(probs.gather(1, experts.clamp(min=0).long()), slots, renormalize)

    n = routed.sum().clamp(min=1).to(probs.dtype)
    leading = count(experts[:, :1], E) if gshard else counts.clone()
    share = leading / (n * (1 if gshard else top_k))
    balance = E * (probs.where(routed[:, None], 0.0).sum(0) / n * share).sum()
    z = (logits.logsumexp(-1).square().where(routed, 0.0) / n).sum()
    return Routing(weights, experts, slots, order, counts, ends, balance, z, logits.detach()), leading


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float | None, least: int) -> int:
    """Rows an expert has room for: all tokens, or DeepSpeed's ceil(S / E factor K), padding included."""
    return num_tokens if factor is None else max(math.ceil(min(num_tokens / num_experts * factor * top_k, 2**31 - 1)), least)


def choose(logits: Tensor, top_k: int) -> Tensor:
    """The top_k largest of each row in falling order, the first of equals: (S, K) int32. A NaN is taken for the smallest."""
    rest, chosen = logits.nan_to_num(nan=SMALLEST, neginf=SMALLEST).clamp(min=SMALLEST), []
    for _ in range(top_k):
        chosen.append(rest.argmax(-1, keepdim=True))
        rest = rest.scatter(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, 1).int()


def weigh(probs: Tensor, slots: Tensor, renormalize: bool) -> Tensor:
    """Probabilities of the choices (S, K) as weights: 0 where not kept, and over their sum if so asked."""
    weights = probs.where(slots >= 0, 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=EPS) if renormalize else weights


def count(experts: Tensor, num_experts: int) -> Tensor:
    """Choices of each expert: (E,) int32."""
    return _chosen(experts, num_experts).sum(0, dtype=torch.int32)


def _chosen(experts: Tensor, num_experts: int) -> Tensor:
    """(S, E) int32: 1 where a token chose an expert."""
    mask = experts.new_zeros(len(experts), num_experts + 1)
    return mask.scatter_(1, experts.long().where(experts >= 0, num_experts), 1)[:, :num_experts]


def place(experts: Tensor, num_experts: int, capacity: int, priority: Tensor | None, gshard: bool) -> tuple[Tensor, ...]:
    """Slots, order, counts and ends of the choices (S, K), as Routing has them."""
    (S, K), counts = experts.shape, count(experts, num_experts)
    if priority is not None and capacity < S:
        chosen = _chosen(experts, num_experts).bool()
        best = priority.detach().double().masked_fill(~chosen, -torch.inf).topk(capacity, 0).indices
        staying = torch.zeros_like(chosen).scatter_(0, best, True)
        experts = experts.where(staying.gather(1, experts.clamp(min=0).long()), -1)
    positions, total = [], torch.zeros_like(counts)
    for choices in experts.split(1 if gshard else K, 1):
        chosen = _chosen(choices, num_experts)
        before = chosen.cumsum(0, dtype=torch.int32) - chosen + total
        positions.append(before.gather(1, choices.clamp(min=0).long()))
        total = total + chosen.sum(0, dtype=torch.int32)
    position, kept = torch.cat(positions, 1), total.clamp(max=capacity)
    ends = kept.cumsum(0, dtype=torch.int32)
    slots = position + (ends - kept)[experts.clamp(min=0).long()]
    slots = slots.where((experts >= 0) & (position < capacity), -1)
    rows = slots.long().where(slots >= 0, S * K).flatten()
    choice = torch.arange(S * K, dtype=torch.int32, device=experts.device)
    order = choice.new_full((S * K + 1,), -1).scatter_(0, rows, choice)[:-1]
    return slots, order.clone(), counts, ends
