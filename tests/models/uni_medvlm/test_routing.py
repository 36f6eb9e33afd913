"""Routing against a loop over tokens in float64, against DeepSpeed's, and what padding and capacity do."""

import numpy as np
import pytest
import torch

from models.uni_medvlm.experts import MixtureOfExperts, SwiGLU, present_keys
from models.uni_medvlm.routing import RoutingOptions, moe_mlp, route
from tests.models.sam.conftest import Golden

S, H, E = 23, 6, 4


@pytest.fixture(scope="module")
def deepspeed(golden):
    return Golden(golden / "uni_medvlm", "moe_golden")


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(S, H, generator=generator, dtype=dtype).requires_grad_()
    gate = torch.randn(E, H, generator=generator, dtype=dtype).requires_grad_()
    torch.manual_seed(4)
    return hidden, gate, [SwiGLU(H, 8).to(dtype) for _ in range(E)]


def by_loops(hidden, gate, experts, options, real):
    """(output, balance, z, dropped), one token after the other; who is dropped is decided with lists."""
    probs = [torch.softmax(gate @ x, 0) for x in hidden]
    choices = {s: sorted(range(E), key=lambda e, s=s: -probs[s][e].item())[: options.top_k] for s in range(S) if real[s]}
    counts = [sum(e in chosen for chosen in choices.values()) for e in range(E)]
    takes = {}
    for e in range(E):
        askers = [s for s in choices if e in choices[s]]
        if options.drop == "probs":
            askers.sort(key=lambda s, e=e: -probs[s][e].item())
        if options.capacity_factor is not None:
            capacity = int(np.ceil(len(choices) * options.capacity_factor * options.top_k / E))
            askers = askers[: max(capacity, options.min_capacity)]
        takes[e] = set(askers)
    rows = []
    for s in range(S):
        mine = [e for e in choices.get(s, []) if s in takes[e]]
        total = sum((probs[s][e] for e in mine), torch.zeros((), dtype=hidden.dtype)) if options.renormalize else 1
        rows.append(sum((probs[s][e] / total * experts[e](hidden[s]) for e in mine), torch.zeros_like(hidden[s])))
    n = len(choices)
    balance = E * sum(sum(probs[s][e] for s in choices) / n * counts[e] / (n * options.top_k) for e in range(E))
    z = sum(torch.logsumexp(gate @ hidden[s], 0) ** 2 for s in choices) / n
    return torch.stack(rows), balance, z, sum(counts) - sum(map(len, takes.values()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("capacity_factor, drop", [(None, "position"), (0.6, "position"), (0.6, "probs")])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(top_k, capacity_factor, drop, renormalize, padded):
    options = RoutingOptions(top_k, capacity_factor, drop=drop, renormalize=renormalize)
    hidden, gate, experts = tensors()
    real = torch.ones(S, dtype=torch.bool)
    if padded:
        real[[0, 1, 7, 22]] = False
    leaves = [hidden, gate, *(p for expert in experts for p in expert.parameters())]

    expected, balance, z, dropped = by_loops(hidden, gate, experts, options, real.tolist())
    wanted = torch.autograd.grad(expected.square().sum() + 0.3 * balance + 0.2 * z, leaves)
    routing = route(hidden, gate, options, real if padded else None)
    y = moe_mlp(hidden, routing, experts)
    got = torch.autograd.grad(y.square().sum() + 0.3 * routing.balance_loss + 0.2 * routing.z_loss, leaves)

    for actual, right in zip((y, routing.balance_loss, routing.z_loss, *got), (expected, balance, z, *wanted), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12)
    assert routing.counts.sum() - (routing.slots >= 0).sum() == dropped and (dropped > 0) == (capacity_factor is not None)
    assert not y[~real].any() and (routing.slots[~real] == -1).all()


def test_an_expert_takes_at_least_the_least_capacity():
    hidden, gate, _ = tensors()
    for least, most in ((0, 3), (5, 5)):  # ceil(0.25 * 2 * 23 / 4) = 3
        routing = route(hidden, gate, RoutingOptions(2, 0.25, min_capacity=least))
        assert routing.slots.max() == most - 1


def test_slots_count_each_experts_tokens_from_zero():
    hidden, gate, _ = tensors()
    routing = route(hidden, gate, RoutingOptions(2, 0.5))
    for e in range(E):
        slots = routing.slots[(routing.experts == e) & (routing.slots >= 0)]
        assert slots.tolist() == list(range(len(slots)))


def test_what_padding_holds_changes_nothing():
    hidden, gate, experts = tensors()
    real = torch.arange(S) < 15
    other = torch.where(real[:, None], hidden, 100 * torch.rand(S, H))
    options = RoutingOptions(2, 0.7)
    results = []
    for x in (hidden, other):
        routing = route(x, gate, options, real)
        results.append((moe_mlp(x, routing, experts), routing.counts, routing.balance_loss, routing.z_loss))
    alone = route(hidden[:15], gate, options)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(results[0][2], alone.balance_loss)
    torch.testing.assert_close(results[0][0][:15], moe_mlp(hidden[:15], alone, experts))


def test_nothing_but_padding_gives_zeros_and_finite_losses():
    hidden, gate, experts = tensors()
    routing = route(hidden, gate, RoutingOptions(2, 1.0), torch.zeros(S, dtype=torch.bool))
    y = moe_mlp(hidden, routing, experts)
    (y.sum() + routing.balance_loss + routing.z_loss).backward()
    assert not y.any() and routing.balance_loss == 0 and hidden.grad.isfinite().all()


def test_the_router_decides_in_float32_under_autocast_and_in_bfloat16():
    hidden, gate, experts = tensors(torch.float32)
    exact = route(hidden.bfloat16(), gate, RoutingOptions(2))
    with torch.autocast("cpu", torch.bfloat16):
        routing = route(hidden.bfloat16(), gate, RoutingOptions(2))
        y = moe_mlp(hidden.bfloat16(), routing, experts)
    assert routing.weights.dtype == torch.float32 and torch.equal(routing.weights, exact.weights) and y.dtype == torch.bfloat16


def test_an_expert_without_tokens_has_gradients_of_zero():
    hidden, _, experts = tensors()
    gate = torch.zeros(E, H, dtype=torch.float64)
    gate[0], gate[1] = 1, -1  # one of the two always wins
    moe_mlp(hidden, route(hidden, gate, RoutingOptions(1)), experts).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts[3].parameters())


def test_options_that_cannot_be_are_refused():
    hidden, gate, _ = tensors()
    for wrong, message in (
        ({"top_k": 0}, "top_k must be 1 or more, not 0"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive or None, not 0.0"),
        ({"drop": "random"}, "drop must be 'position' or 'probs', not 'random'"),
    ):
        with pytest.raises(ValueError, match=message):
            RoutingOptions(**wrong)
    with pytest.raises(ValueError, match="top_k is 5, and there are 4 experts"):
        route(hidden, gate, RoutingOptions(5))


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------


def dense(routing, num_experts):
    """[S, E] weights and slots, as the golden files keep them."""
    weights = torch.zeros(len(routing.experts), num_experts).scatter(1, routing.experts, routing.weights)
    slots = torch.full((len(routing.experts), num_experts), -1).scatter(1, routing.experts, routing.slots)
    return weights, slots


TOP_K = [
    (num_experts, k, drop, factor)
    for num_experts, ks in ((2, (1, 2)), (4, (1, 2, 3)))
    for k in ks
    for drop in ("probs", "position")
    for factor in (1.0, 1.5, 2.0)
]


@pytest.mark.parametrize("num_experts, k, drop, factor", TOP_K)
def test_golden_top_k_gating_with_drops(deepspeed, num_experts, k, drop, factor):
    name = f"ds0198_top{k}k_{drop}_E{num_experts}_cf{factor}_mc0_drop"
    logits = torch.from_numpy(deepspeed.arrays[f"logits_E{num_experts}"])
    routing = route(logits, torch.eye(num_experts), RoutingOptions(k, factor, drop=drop))
    weights, slots = dense(routing, num_experts)
    case = deepspeed.facts["cases"][name]
    assert np.array_equal(slots, deepspeed.arrays[f"{name}/slot"])
    assert deepspeed.error(f"{name}/w", weights) < 1e-6
    assert routing.balance_loss.item() == pytest.approx(case["l_aux"], abs=1e-6)
    assert routing.counts.tolist() == case["exp_counts"]


@pytest.mark.parametrize("num_experts", [2, 4])
def test_golden_top_1_gating_keeps_raw_weights(deepspeed, num_experts):
    name = f"ds0131_top1_rts_E{num_experts}_cf1.0_mc0_nodrop"
    logits = torch.from_numpy(deepspeed.arrays[f"logits_E{num_experts}"])
    weights, slots = dense(route(logits, torch.eye(num_experts), RoutingOptions(1, renormalize=False)), num_experts)
    assert np.array_equal(slots, deepspeed.arrays[f"{name}/slot"]) and deepspeed.error(f"{name}/w", weights) < 1e-6


@pytest.mark.parametrize("name", ["ds0131_E2_k1", "ds0131_E4_k1", "ds0198_E4_k1", "ds0131_E2_k2", "ds0198_E2_k2"])
def test_golden_moe_layer_forward_and_backward(deepspeed, name):
    """Whole layers in which nothing is dropped, so that neither noise nor capacity plays a part."""
    num_experts, k = int(name[8]), int(name[11])
    options = RoutingOptions(k, renormalize=k > 1)
    layer = MixtureOfExperts([SwiGLU(64, 176) for _ in range(num_experts)], 64, options)
    shapes = {f"{p}_proj.weight": (64, 176) if p == "down" else (176, 64) for p in ("gate", "up", "down")}
    keys = {f"experts.deepspeed_experts.{e}.{key}": shape for e in range(num_experts) for key, shape in shapes.items()}
    state = {key: torch.empty(shape) for key, shape in ({"gate.wg.weight": (num_experts, 64)} | keys).items()}
    deepspeed.fill.fill_(state, "deepspeed_moe.")
    scaled = {f"deepspeed_moe.{key}": tensor * (25 if "wg" in key else 5) for key, tensor in state.items()}
    layer.load_state_dict(present_keys(scaled), strict=True)

    x = deepspeed.seeded(4001, (2, 48, 64)).requires_grad_()
    y = layer(x)
    first = route(x.flatten(0, 1), layer.router, RoutingOptions(1)).balance_loss  # DeepSpeed's top-2 counts first choices only
    (y.square().sum() + 0.01 * first).backward()
    golden = f"layer/{name}_cf1.5_f32"
    for part, tensor in (("y", y[:, ::4, ::4]), ("gx", x.grad[:, ::4, ::4]), ("gwg", layer.router.grad)):
        assert deepspeed.error(f"{golden}/{part}", tensor) < 1e-4 * abs(deepspeed.arrays[f"{golden}/{part}"]).max(), part
    assert first.item() == pytest.approx(deepspeed.facts["cases"][golden]["l_aux"], abs=1e-6)
