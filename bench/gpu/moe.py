"""Checks and timings of the mixture-of-experts kernels for bench.gpu: router, places, dispatch and combine, experts.

S tokens of H = 4096 channels, the width of Llama-3.1-8B (two experts and one choice are Uni-MedVLM's), E experts, K choices; states
in bfloat16, the gate in float32. The least that a case needs:

    FLOPs    experts: 6 S K H I forward with I inner channels, with the backward three times that; the gate's 2 S E H are no limit
    bytes    router: x and the gate's weight once; with the backward x once more, and dx. From logits: 8 S E, and 12 S K of weights,
             experts and slots. Places: 20 S K, experts and probabilities in, weights, slots and order out. Dispatch and combine:
             S H and S K H elements each
"""

from functools import partial

import torch

from bench.measure import (
    Check,
    TimedCase,
    Timing,
    against_eager,
    largest_errors,
    relative_errors,
    training,
    with_gradients,
    without_grad,
)
from kernels import moe_dispatch, moe_router
from kernels.launch import launch, runs_triton
from kernels.moe_dispatch import moe_mlp, moe_mlp_reference
from kernels.moe_router import route
from kernels.moe_routing import choose, place, route_reference

H = 4096
OPTIONS = {
    "dropless": {},
    "capacity": {"capacity_factor": 0.8},
    "gshard": {"capacity_factor": 1.0, "gshard": True},
    "by probability": {"capacity_factor": 0.8, "priority": "probability"},
}
# tokens, experts, choices
ROUTERS = [(333, 2, 1), (333, 4, 2), (500, 8, 2), (97, 64, 8), (77, 128, 8), (77, 256, 8)]
SANITIZED = ("router (333, 4", "router (97, 64", "router, float32", "places (500", "mixture (333, 4, 2)")
GOALS = {2: 0.028, 8: 0.028, 128: 0.032, 256: 0.032}  # ms of a router forward at 8192 tokens, by experts
GATE_ERROR = 4e-6  # relative, allowed beside eager's: a product of three tf32 terms drops the last, and adds as tensor cores do
FORWARD, BOTH = 600e12, 550e12  # FLOP/s of few experts


def router_inputs(device, S, E, width=H, dtype=torch.bfloat16):
    """Seeded states, gate and padding; logits have a variance of two."""
    generator = torch.Generator(device).manual_seed(S + E)
    hidden, gate = (torch.randn(shape, device=device, generator=generator) for shape in ((S, width), (E, width)))
    return hidden.to(dtype), gate * (2 / width) ** 0.5, torch.rand(S, device=device, generator=generator) < 0.9


def _router_values(router, dtype, hidden, gate, mask, top_k, **options):
    """Weights, losses and the gradients of states and gate, as float64."""
    leaves = [
        hidden.to(dtype).requires_grad_(),
        gate.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_(),
    ]
    routing = router(*leaves, top_k, mask=mask, **options)
    weigh = torch.arange(routing.weights.numel(), device=hidden.device).cos().view_as(routing.weights)
    total = (routing.weights * weigh).sum() + routing.balance_loss + routing.z_loss
    values = (routing.weights, routing.balance_loss, routing.z_loss, *torch.autograd.grad(total, leaves))
    return [value.detach().double() for value in values]


def _check_router(device, S, E, K, width, options, dtype=torch.bfloat16):
    case = router_inputs(device, S, E, width, dtype)
    runs = ((route, dtype), (route_reference, dtype), (route_reference, torch.float64))
    ours, eager, truth = (_router_values(router, kind, *case, K, **options) for router, kind in runs)
    kinds = ((relative_errors, GATE_ERROR), (largest_errors, 4 * GATE_ERROR))
    return torch.cat([errors(ours, truth) / (2 * errors(eager, truth) + floor) for errors, floor in kinds]).max().item(), 1.0


def _check_places(device, S, E, K, options):
    """How many experts, slots, rows and ends differ from those of the specification, given our own logits."""
    hidden, gate, mask = router_inputs(device, S, E, 64)
    routing = route(hidden, gate, K, mask=mask, **options)
    experts = choose(routing.logits, K).where(mask[:, None], -1)
    by = routing.logits.softmax(-1) if "priority" in options else None
    capacity = moe_router.expert_capacity(S, E, K, options.get("capacity_factor"), 0)
    expected = (experts, *place(experts, E, capacity, by, options.get("gshard", False)))
    ours = (routing.experts, routing.slots, routing.order, routing.counts, routing.ends)
    return float(sum((mine != theirs).sum().item() for mine, theirs in zip(ours, expected, strict=True))), 0.0


def _check_router_bits(device, S, E, K, width):
    case = router_inputs(device, S, E, width)
    runs = (_router_values(route, torch.bfloat16, *case, K) for _ in range(2))
    return float(sum(not torch.equal(first, second) for first, second in zip(*runs, strict=True))), 0.0


def mixture_inputs(device, S, E, K, width, inner, dtype=torch.bfloat16):
    """Seeded leaves hidden, gate_proj, up_proj and down_proj, and a routing."""
    hidden, gate, mask = router_inputs(device, S, E, width, dtype)
    generator = torch.Generator(device).manual_seed(1)
    shapes = ((E, inner, width), (E, inner, width), (E, width, inner))
    experts = [torch.randn(shape, device=device, generator=generator).to(dtype) * shape[-1] ** -0.5 for shape in shapes]
    return [hidden, *experts], route(hidden, gate, K, mask=mask)


def _mixture(mlp, routing):
    return lambda hidden, *experts: mlp(hidden, routing._replace(weights=routing.weights.to(_wide(hidden))), *experts)


def _wide(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check_mixture(device, S, E, K, width, inner):
    leaves, routing = mixture_inputs(device, S, E, K, width, inner)
    run = partial(with_gradients, leaves=leaves)
    ours, eager = (run(_mixture(mlp, routing), dtype=torch.bfloat16) for mlp in (moe_mlp, moe_mlp_reference))
    return against_eager(ours, eager, run(_mixture(moe_mlp_reference, routing), dtype=torch.float64))


def checks(device: torch.device, tiny: bool):
    """Router against float64, its indices against the specification, the whole layer against float64."""
    width = 128 if tiny else H
    for S, E, K in ROUTERS:
        for name, options in OPTIONS.items():
            if K > 1 or name != "gshard":
                yield Check(f"router ({S}, {E}, {K}), {name}", partial(_check_router, device, S, E, K, width, options))
    for S, E, K in ROUTERS[1::2] + ROUTERS[-1:]:
        yield Check(f"router, float32 ({S}, {E}, {K})", partial(_check_router, device, S, E, K, width, {}, dtype=torch.float32))
    many = [] if tiny else [(16384, 2, 1), (16384, 128, 8), (40000, 8, 2)]
    for S, E, K in ROUTERS + many:
        for name, options in OPTIONS.items():
            yield Check(f"places ({S}, {E}, {K}), {name}", partial(_check_places, device, S, E, K, options))
    yield Check("router, same bits twice", partial(_check_router_bits, device, 500, 8, 2, width))
    for S, E, K in [(333, 2, 1), (333, 4, 2), (500, 12, 2), (97, 64, 8)]:
        yield Check(f"mixture ({S}, {E}, {K})", partial(_check_mixture, device, S, E, K, width, 2 * width if tiny else 512))


def _router_timing(device, S, E, K, width, backward):
    hidden, gate, _ = router_inputs(device, S, E, width)
    moved = 2 * hidden.numel() + 4 * gate.numel()
    routers = {"ours": route, "eager": route_reference, "compile": torch.compile(route_reference)}
    if not backward:
        runs = {name: partial(without_grad, router, hidden, gate, K) for name, router in routers.items()}
        return Timing(runs, 0, moved, GOALS.get(E) if S == 8192 else None, graphed=True)

    def loss(router):
        def total(hidden, gate):
            routing = router(hidden, gate, K)
            return routing.weights.square().sum() + 0.01 * routing.balance_loss + 0.001 * routing.z_loss

        return total

    leaves = [hidden.requires_grad_(), gate.requires_grad_()]
    return Timing({name: training(loss(router), leaves) for name, router in routers.items()}, 0, 3 * moved)


def _choice_timing(device, S, E, K):
    logits = torch.randn(S, E, device=device)
    routers = {"ours": route, "eager": route_reference, "compile": torch.compile(route_reference)}
    runs = {name: partial(without_grad, router, logits, None, K) for name, router in routers.items()}
    return Timing(runs, 0, 8 * logits.numel() + 12 * S * K, 0.009, graphed=True)


def _places_timing(device, S, E, K):
    """The second launch alone."""
    hidden, gate, _ = router_inputs(device, S, E, 64)
    experts = route(hidden, gate, K).experts
    providers = {"eager": partial(place, experts, E, S, None, False)}
    if runs_triton(hidden):
        chunk = -(-S // (moe_router.PROGRAMS * moe_router.GATE_TOKENS)) * moe_router.GATE_TOKENS
        programs = -(-S // chunk)
        padded = torch.nn.functional.pad(experts, (0, 0, 0, programs * chunk - S), value=-1).view(programs, -1)
        counts = torch.stack([torch.bincount(part[part >= 0], minlength=E) for part in padded]).int()
        probs, weights = (torch.rand(S, K, device=device) for _ in range(2))
        sums, one = torch.rand(programs, E + 1, device=device), torch.zeros((), device=device)
        slots, order, totals, ends = (torch.empty_like(x) for x in (experts, experts.flatten(), counts[0], counts[0]))
        arguments = (experts, probs, counts, sums, sums, weights, slots, order, totals, totals.clone(), ends, one, one.clone())
        constants = moe_router._place_constants(E, K, False, True)
        sizes = (S, E, chunk, programs, S, moe_router.EPS)
        run = partial(launch, moe_router._place_kernel, (programs,), *arguments, *sizes, **constants)
    else:
        run = providers["eager"]
    return Timing({"ours": run} | providers, 0, 20 * S * K, 0.005, graphed=True)


def _move_timing(device, S, E, K, width):
    """Dispatch and combine, with nothing between; einsum: with DeepSpeed's masks at capacity 1.5."""
    hidden, gate, _ = router_inputs(device, S, E, width)
    routing = route(hidden, gate, K)
    places, token = (routing.slots, routing.order), routing.order.long() // K

    def ours():
        return moe_dispatch.moe_combine(moe_dispatch.moe_dispatch(hidden, *places), *places, routing.weights)

    def eager():
        rows = hidden[token]
        return (rows[routing.slots.long()] * routing.weights[..., None]).sum(1).to(hidden.dtype)

    C = int(1.5 * S * K / E)
    begins = (routing.ends - routing.counts).long()
    position = routing.slots.long() - begins[routing.experts.long()]
    masks = torch.zeros(S, E, C, device=device, dtype=hidden.dtype)
    s, k = (position < C).nonzero(as_tuple=True)
    masks[s, routing.experts[s, k].long(), position[s, k]] = routing.weights[s, k].to(hidden.dtype)
    chosen = (masks != 0).to(hidden.dtype)

    def einsum():
        return torch.einsum("sec,ecm->sm", masks, torch.einsum("sec,sm->ecm", chosen, hidden))

    providers = {name: partial(without_grad, run) for name, run in (("ours", ours), ("eager", eager), ("einsum", einsum))}
    return Timing(providers, 0, 2 * 2 * (1 + K) * hidden.numel(), 0.11 if (S, E) == (8192, 2) else None, graphed=True)


def _experts_timing(device, S, E, K, width, inner, backward):
    leaves, routing = mixture_inputs(device, S, E, K, width, inner)
    flops = 6 * int(routing.ends[-1]) * width * inner
    few, layers = E <= moe_dispatch.FEW_EXPERTS, {"ours": moe_mlp, "eager": moe_mlp_reference}
    if not backward:
        runs = {name: partial(without_grad, mlp, leaves[0], routing, *leaves[1:]) for name, mlp in layers.items()}
        return Timing(runs, flops, 0, 1e3 * flops / FORWARD if few else None)
    leaves, seed = [leaf.requires_grad_() for leaf in leaves], torch.randn_like(leaves[0])
    runs = {name: training(_mixture(mlp, routing), leaves, grad_output=seed) for name, mlp in layers.items()}
    return Timing(runs, 3 * flops, 0, 3e3 * flops / BOTH if few else None)


def timings(device: torch.device, tiny: bool):
    """The goals of the project for a mixture of experts, each with its peers."""
    S, width = (64, 64) if tiny else (8192, H)
    for E, K in ((2, 1), (8, 2), (128, 8), (256, 8)):
        for backward in (False, True):
            name = f"router fwd{'+bwd' * backward} {[S, width]}, E={E}, K={K}"
            yield TimedCase(name, partial(_router_timing, device, S, E, K, width, backward))
    yield TimedCase(f"router from logits {[2 * S, 128]}, K=8", partial(_choice_timing, device, 2 * S, 128, 8))
    for E, K in ((2, 1), (8, 2)):
        yield TimedCase(f"places {[S]}, E={E}, K={K}", partial(_places_timing, device, S, E, K), peers=False)
        yield TimedCase(f"dispatch + combine {[S, width]}, E={E}, K={K}", partial(_move_timing, device, S, E, K, width))
    shapes = ((2, 1, width, 2 * width), (8, 2, width, 2 * width)) if tiny else ((2, 1, H, 14336), (8, 2, H, 14336))
    for E, K, wide, inner in (*shapes, (64, 8, width // 2, width // 4)):
        for backward in (False, True):
            name = f"experts fwd{'+bwd' * backward} {[S, wide, inner]}, E={E}, K={K}"
            yield TimedCase(name, partial(_experts_timing, device, S, E, K, wide, inner, backward), peers=False)
