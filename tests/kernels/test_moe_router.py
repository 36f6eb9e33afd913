"""The router against its specification, DeepSpeed's gating and itself without padding; its Triton bodies against float64."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import moe_router
from kernels.moe_router import moe_route_backward, moe_route_forward, route
from kernels.moe_routing import route_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
S, H = 37, 24
OPTIONS = {
    "top-1": {"top_k": 1},
    "top-1, capacity": {"top_k": 1, "capacity_factor": 0.7},
    "top-2": {"top_k": 2},
    "top-2, raw, capacity": {"top_k": 2, "renormalize": False, "capacity_factor": 0.8},
    "top-2, gshard, capacity": {"top_k": 2, "gshard": True, "capacity_factor": 1.0},
    "top-2, by probability": {"top_k": 2, "priority": "probability", "capacity_factor": 0.8},
    "top-1, renormalised": {"top_k": 1, "renormalize": True},
}


def inputs(E: int, dtype=torch.float32, tokens: int = S, padding: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, gate and mask; more tokens choose the first expert."""
    generator = torch.Generator().manual_seed(E + tokens)
    hidden, gate = (torch.randn(shape, generator=generator) for shape in ((tokens, H), (E, H)))
    gate[0] += 0.3 * hidden.mean(0)
    mask = torch.rand(tokens, generator=generator) < 0.8 if padding else None
    return hidden.to(dtype), gate.to(torch.float64 if dtype == torch.float64 else torch.float32), mask


def with_gradients(router, hidden, gate, mask, seeds=(1.0, 0.3, 0.2), **options):
    """The Routing, and the gradients of a sum in which weights and both losses have a part."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, gate)]
    routing = router(*leaves, mask=mask, **options)
    weigh = torch.arange(routing.weights.numel(), dtype=routing.weights.dtype).cos().view_as(routing.weights)
    total = seeds[0] * (routing.weights * weigh).sum() + seeds[1] * routing.balance_loss + seeds[2] * routing.z_loss
    return routing, torch.autograd.grad(total, leaves)


def assert_equal_routing(ours, exact, tolerance):
    for name in ("experts", "slots", "order", "counts", "ends"):
        assert torch.equal(getattr(ours, name), getattr(exact, name)), name
    for name in ("weights", "balance_loss", "z_loss", "logits"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name).double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("E", [2, 5, 64])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_outputs_and_gradients_equal_the_specification(name, E):
    case = inputs(E, torch.float64)
    exact, expected = with_gradients(route_reference, *case, **OPTIONS[name])
    ours, gradients = with_gradients(route, *case, **OPTIONS[name])
    assert_equal_routing(ours, exact, 1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("router", [route, route_reference])
@pytest.mark.parametrize("name", ["top-1", "top-2", "top-2, raw, capacity", "top-2, gshard, capacity"])
def test_gradcheck(router, name):
    hidden, gate, mask = inputs(4, torch.float64, tokens=9)

    def smooth(hidden, gate):
        routing = router(hidden, gate, mask=mask, **OPTIONS[name])
        return routing.weights, routing.balance_loss, routing.z_loss

    assert torch.autograd.gradcheck(smooth, (hidden.requires_grad_(), gate.requires_grad_()))


def test_slots_and_order_are_one_permutation_and_experts_have_rows_of_their_own():
    hidden, gate, mask = inputs(5)
    routing = route(hidden, gate, 2, mask=mask, capacity_factor=0.8)
    kept = routing.slots >= 0
    assert 0 < kept.sum() < 2 * mask.sum() and kept.sum() == routing.ends[-1]
    choices = torch.arange(2 * S).view(S, 2)
    assert torch.equal(routing.order[routing.slots[kept].long()].long(), choices[kept])
    assert (routing.order[routing.ends[-1] :] == -1).all()
    begins = torch.cat([routing.ends.new_zeros(1), routing.ends])
    for e in range(5):
        rows = routing.order[begins[e] : begins[e + 1]].long()
        assert (routing.experts.flatten()[rows] == e).all() and (rows.diff() > 0).all()


def test_padding_is_not_routed_and_changes_nothing():
    hidden, gate, mask = inputs(5)
    padded, alone = (route(states, gate, 2, mask=given) for states, given in ((hidden, mask), (hidden[mask], None)))
    assert (padded.experts[~mask] == -1).all() and (padded.slots[~mask] == -1).all() and not padded.weights[~mask].any()
    for name in ("weights", "experts", "slots"):
        assert torch.equal(getattr(padded, name)[mask], getattr(alone, name)), name
    for name in ("counts", "ends"):
        assert torch.equal(getattr(padded, name), getattr(alone, name)), name
    torch.testing.assert_close((padded.balance_loss, padded.z_loss), (alone.balance_loss, alone.z_loss))
    for nothing in (torch.zeros(S, dtype=torch.bool), torch.zeros(S, dtype=torch.int64)):
        empty, gradients = with_gradients(route, hidden, gate, nothing, top_k=2)
        assert empty.balance_loss == 0 and empty.z_loss == 0 and not empty.counts.any() and (empty.order == -1).all()
        assert not any(gradient.any() for gradient in gradients)


def test_equal_logits_choose_the_first_experts_and_a_nan_none():
    logits = torch.tensor([[1.0, 1.0, 1.0], [torch.nan, -torch.inf, 2.0], [-torch.inf, 0.0, 0.0]])
    routing = route(logits, None, 2)
    assert routing.experts.tolist() == [[0, 1], [2, 0], [1, 2]]


def test_logits_give_what_states_give():
    hidden, gate, mask = inputs(8)
    states, expected = with_gradients(route, hidden, gate, mask, top_k=2)
    logits = states.logits.clone().requires_grad_()
    given = route(logits, None, 2, mask=mask)
    assert_equal_routing(given, states, 0)
    weigh = torch.arange(2 * S, dtype=torch.float32).cos().view(S, 2)
    total = (given.weights * weigh).sum() + 0.3 * given.balance_loss + 0.2 * given.z_loss
    [gradient] = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient @ gate, expected[0], rtol=1e-5, atol=1e-6)


def test_the_gate_is_computed_in_float32_under_autocast_and_for_half_states():
    hidden, gate, _ = inputs(8, torch.bfloat16)
    exact = hidden.double() @ gate.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = route(hidden, gate, 2).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("renormalize", "dynamic"), [(False, False), (True, True)])
def test_it_compiles_without_a_graph_break(renormalize, dynamic):
    torch._dynamo.reset()
    hidden, gate, mask = inputs(4)

    def step(hidden, gate, mask):
        routing = route(hidden.sin(), gate, 2, mask=mask, renormalize=renormalize, capacity_factor=0.8)
        return (routing.weights.square().sum() + routing.balance_loss + routing.z_loss), routing.slots

    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, gate)]
        loss, slots = function(*leaves, mask)
        results.append([loss.detach(), slots, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_opcheck():
    hidden, gate, mask = inputs(4)
    flags = (2, 15, True, False, False)
    torch.library.opcheck(moe_route_forward, (hidden.requires_grad_(), gate.requires_grad_(), mask, None, *flags))
    hidden, gate = hidden.detach(), gate.detach()
    weights, experts, slots, *_, logits, leading = moe_route_forward(hidden, gate, mask, None, *flags)
    one = torch.ones(())
    for need in (True, False):
        given = (weights, one, one, hidden, gate, logits, experts, slots, leading, True, False, need)
        torch.library.opcheck(moe_route_backward, given)


def test_bad_arguments_are_named():
    hidden, gate, mask = inputs(4)
    for message, arguments in {
        r"\(S, H\) and \(E, H\), not \(37, 24\) and \(4, 23\)": ((hidden, gate[:, 1:], 1), {}),
        "top_k 1 to 16 of them, not 4 and 5": ((hidden, gate, 5), {}),
        r"mask must be \(37,\), not \(36,\)": ((hidden, gate, 1), {"mask": mask[1:]}),
        "capacity_factor must be positive, not 0": ((hidden, gate, 1), {"capacity_factor": 0}),
        "priority must be 'probability' or a tensor, not 'noise'": ((hidden, gate, 1), {"priority": "noise"}),
        r"priority must be \(37, 4\), not \(37,\)": ((hidden, gate, 1), {"priority": mask.float()}),
    }.items():
        with pytest.raises(ValueError, match=message):
            route(*arguments[0], **arguments[1])


def options_of(name: str, arrays: dict[str, np.ndarray]) -> dict | None:
    """What stands for one of DeepSpeed's gatings; None for second choices that are drawn."""
    kind, rest = name.split("_E")
    E, factor, least, drop = rest.split("_")
    options: dict = {"capacity_factor": float(factor[2:]) if drop == "drop" else None, "min_capacity": int(least[2:])}
    method = kind.split("_", 1)[1]
    if method == "top2_gumbel":
        return None
    if method.startswith("top1_"):
        return options | {"top_k": 1, "priority": torch.from_numpy(arrays[f"rts_uniform_E{E}"]) if method == "top1_rts" else None}
    if method.startswith("top2_"):
        return options | {"top_k": 2, "gshard": True}
    choices, policy = method.split("_")
    return options | {"top_k": int(choices[3]), "renormalize": True, "priority": "probability" if policy == "probs" else None}


def test_golden_gating_of_deepspeed(golden):
    arrays = dict(np.load(golden / "uni_medvlm" / "moe_golden.npz"))
    cases = json.loads((golden / "uni_medvlm" / "moe_golden.json").read_text())["cases"]
    tried = 0
    for name, case in cases.items():
        if name.startswith("layer/") or "_cf" not in name or (options := options_of(name, arrays)) is None:
            continue
        logits = torch.from_numpy(arrays[f"logits_E{name.split('_E')[1][0]}"])
        routing, tried = route(logits, None, **options), tried + 1
        kept = (routing.slots >= 0).flatten()
        expert = routing.experts.flatten()[kept].long()
        assert torch.bincount(expert, minlength=logits.shape[1]).tolist() == case["kept"], name
        first = routing.experts[:, :1] if "zeronoise" in name else routing.experts
        assert torch.bincount(first.flatten(), minlength=logits.shape[1]).tolist() == case["exp_counts"], name
        assert abs(routing.balance_loss.item() - case["l_aux"]) < 1e-6, name
        if "norts" in name:  # which of equals torch.topk drops is its own affair
            continue
        begins = torch.cat([routing.ends.new_zeros(1), routing.ends])[:-1]
        token = torch.arange(kept.numel())[kept] // options["top_k"]
        slots, weights = torch.full(logits.shape, -1), torch.zeros(logits.shape)
        slots[token, expert] = (routing.slots.flatten()[kept] - begins[expert]).long()
        weights[token, expert] = routing.weights.flatten()[kept]
        assert torch.equal(slots, torch.from_numpy(arrays[f"{name}/slot"]).long()), name
        torch.testing.assert_close(weights, torch.from_numpy(arrays[f"{name}/w"]), rtol=1e-5, atol=1e-6, msg=name)
    assert tried >= 80


@pytest.mark.triton
@pytest.mark.parametrize(("E", "tokens"), [(2, 37), (5, 1), (5, 70), (20, 37)])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_triton_bodies_equal_float64(name, E, tokens, monkeypatch):
    monkeypatch.setattr("kernels.moe_router.PROGRAMS", 2)  # so that a chunk has two tiles
    hidden, gate, mask = inputs(E, tokens=tokens)
    exact, expected = with_gradients(route_reference, hidden.double(), gate.double(), mask, **OPTIONS[name])
    ours, gradients = with_gradients(route, hidden, gate, mask, **OPTIONS[name])
    assert_equal_routing(ours, exact, 1e-5)
    for ours, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.triton
def test_triton_bodies_with_many_experts_and_from_logits():
    hidden, gate, mask = inputs(200)
    exact, expected = with_gradients(route_reference, hidden.double(), gate.double(), mask, top_k=8)
    ours, gradients = with_gradients(route, hidden, gate, mask, top_k=8)
    assert_equal_routing(ours, exact, 1e-5)
    for value, truth in zip(gradients, expected, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-6)
    assert_equal_routing(route(ours.logits, None, 8, mask=mask), ours, 1e-6)


class Calls(TorchDispatchMode):
    """What torch is asked for beside the launches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, given=(), options=None):
        self.names.add(str(function).split(".")[1])
        return function(*given, **(options or {}))


@pytest.mark.triton
@pytest.mark.parametrize("by_logits", [False, True])
def test_forward_and_backward_are_two_launches_and_nothing_else(by_logits, monkeypatch):
    launched = []
    monkeypatch.setattr(moe_router, "launch", lambda kernel, *_, **__: launched.append(kernel))
    hidden, gate, mask = inputs(4)
    given = (hidden @ gate.T, None) if by_logits else (hidden, gate)
    with Calls() as calls:
        weights, experts, slots, *_, balance, z, logits, leading = moe_route_forward._init_fn(
            *given, mask, None, 2, S, True, False, False
        )
        assert len(launched) == 2
        moe_route_backward._init_fn(weights, balance, z, *given, logits, experts, slots, leading, True, False, True)
    assert len(launched) == (3 if by_logits else 4)
    assert calls.names <= {"empty", "empty_like", "new_empty", "view", "slice", "detach"}


@pytest.mark.triton
def test_triton_bodies_take_no_nan_for_the_largest():
    logits = torch.tensor([[1.0, 1.0, 1.0], [torch.nan, -torch.inf, 2.0], [-torch.inf, 0.0, 0.0]])
    routing = route(logits, None, 2)
    assert routing.experts.tolist() == [[0, 1], [2, 0], [1, 2]] and routing.ends.tolist() == [2, 4, 6]
