"""A mixture of SwiGLU experts against its specification and DeepSpeed's layer; its Triton bodies against float64."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import moe_dispatch
from kernels.moe_dispatch import ExpertLinear, grouped_linear, grouped_linear_forward, grouped_outer, moe_mlp, moe_mlp_reference
from kernels.moe_router import route
from kernels.moe_routing import route_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
S, H, INNER, R = 29, 24, 40, 8
WAYS = ["by_expert", "in_rows"]
ROUTES = [{"top_k": 1}, {"top_k": 2}, {"top_k": 2, "capacity_factor": 0.6}]


@pytest.fixture
def way(request, monkeypatch):
    """The CPU goes expert by expert; how a GPU goes is tried here too."""
    if request.param == "in_rows":
        monkeypatch.setattr(moe_dispatch, "_by_expert", moe_dispatch._in_rows)


@pytest.fixture
def in_rows(monkeypatch):
    monkeypatch.setattr(moe_dispatch, "_by_expert", moe_dispatch._in_rows)


def inputs(E: int, dtype=torch.float32, lora: bool = False):
    """Hidden states, gate, mask and leaves of three projections; the last expert is hardly chosen."""
    generator = torch.Generator().manual_seed(E)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    hidden, gate, mask = randn(S, H), randn(E, H), torch.rand(S, generator=generator) < 0.8
    leaves = []
    for out, width in ((INNER, H), (INNER, H), (H, INNER)):
        leaves.append([randn(E, out, width)] + ([randn(E, R, width), randn(E, out, R)] if lora else []))
    return hidden, gate, mask, leaves


def run(mlp, router, case, listed=False, **options):
    """Output and the gradient of every leaf."""
    hidden, gate, mask, leaves = case

    def given(tensors):
        return ExpertLinear(*(list(tensor.unbind()) if listed else tensor for tensor in tensors), scale=0.5)

    out = mlp(hidden, router(hidden, gate, mask=mask, **options), *(given(tensors) for tensors in leaves))
    weigh = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weigh).sum(), [hidden, gate, *(t for tensors in leaves for t in tensors)])]


def assert_close(ours, exact, tolerance):
    for index, (value, truth) in enumerate(zip(ours, exact, strict=True)):
        error = (value.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-3)
        assert error < tolerance, (index, error)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("E", [2, 5, 12])
@pytest.mark.parametrize("options", ROUTES, ids=str)
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_outputs_and_gradients_equal_the_specification(options, E, lora, listed, way):
    case = inputs(E, torch.float64, lora)
    expected = run(moe_mlp_reference, route_reference, case, **options)
    assert_close(run(moe_mlp, route, case, listed, **options), expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("E", [4, 12])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_in_its_own_type_it_is_as_exact_as_the_specification(E, dtype, way):
    hidden, gate, mask, leaves = inputs(E, dtype, lora=True)
    double = [leaf.detach().double().requires_grad_() for leaf in (hidden, gate)]
    doubles = [[leaf.detach().double().requires_grad_() for leaf in tensors] for tensors in leaves]
    exact = run(moe_mlp_reference, route_reference, (*double, mask, doubles), top_k=2)
    eager = run(moe_mlp_reference, route_reference, (hidden, gate, mask, leaves), top_k=2)
    ours = run(moe_mlp, route, (hidden, gate, mask, leaves), top_k=2)
    for value, plain, truth in zip(ours, eager, exact, strict=True):
        error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (value, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("E", [5, 12])
def test_grouped_products_equal_one_by_one(E, in_rows, monkeypatch):
    case = inputs(E, torch.float32, lora=True)
    grouped = []
    monkeypatch.setattr(F, "grouped_mm", lambda *given, real=F.grouped_mm, **rest: grouped.append(1) or real(*given, **rest))
    results = []
    for few in (E - 1, E):
        monkeypatch.setattr(moe_dispatch, "FEW_EXPERTS", few)
        results.append(run(moe_mlp, route, case, top_k=2))
        assert len(grouped) == 27  # nine products of an expert, forward and two gradients of each, with the adapters'
    assert_close(*results, 1e-5)


def test_where_there_is_no_grouped_product_experts_go_one_by_one(in_rows, monkeypatch):
    case, asked = inputs(12), []
    expected = run(moe_mlp, route, case, top_k=2)
    monkeypatch.setattr(F, "grouped_mm", lambda *_, **__: asked.append(1) or torch.zeros(2) @ torch.zeros(3))  # RuntimeError
    monkeypatch.setattr(moe_dispatch, "_WITHOUT_GROUPED", set())
    assert_close(run(moe_mlp, route, case, top_k=2), expected, 1e-5)
    assert len(asked) == 1


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_an_expert_without_tokens_has_no_gradient_and_changes_nothing(way):
    hidden, gate, mask, leaves = inputs(5)
    logits = torch.randn(S, 5)
    logits[:, 3] = -100
    out = moe_mlp(hidden, route(logits, None, 2, mask=mask), *(ExpertLinear(*tensors) for tensors in leaves))
    gradients = torch.autograd.grad(out.sum(), [tensors[0] for tensors in leaves])
    assert out[mask].isfinite().all() and not out[~mask].any()
    assert all(not gradient[3].any() and gradient[2].any() for gradient in gradients)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_frozen_experts_with_adapters_have_gradients_of_the_adapters_only(way):
    hidden, gate, mask, leaves = inputs(2, lora=True)
    frozen = [[tensors[0].detach(), *tensors[1:]] for tensors in leaves]
    out = moe_mlp(hidden, route(hidden, gate, 1, mask=mask), *(ExpertLinear(*tensors) for tensors in frozen))
    out.sum().backward()
    assert all(tensors[0].grad is None and tensors[1].grad.any() and tensors[2].grad.any() for tensors in frozen)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_under_autocast_products_are_in_its_type_and_the_output_in_that_of_the_states(way):
    hidden, gate, mask, leaves = inputs(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_linear(hidden, leaves[0][0], torch.tensor([1, 2, 3, 4], dtype=torch.int32)).dtype == torch.bfloat16
        ours = run(moe_mlp, route, (hidden, gate, mask, leaves), top_k=2)
    assert ours[0].dtype == torch.float32
    assert_close(ours[:1], run(moe_mlp, route, (hidden, gate, mask, leaves), top_k=2)[:1], 2e-2)


@pytest.mark.parametrize("E", [4, 12])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_gradcheck(E, way):
    hidden, gate, _, leaves = inputs(E, torch.float64)
    hidden = hidden.detach()[:5].requires_grad_()

    def mixture(hidden, *weights):
        return moe_mlp(hidden, route(hidden, gate.detach(), 2), *map(ExpertLinear, weights))

    small = [weight[:, :3, :4] for weight in (leaves[0][0], leaves[1][0])] + [leaves[2][0][:, :4, :3]]
    gate = gate[:, :4]
    given = [tensor.detach().contiguous().requires_grad_() for tensor in (hidden[:, :4], *small)]
    assert torch.autograd.gradcheck(mixture, given)


@pytest.mark.parametrize(("E", "dynamic", "backend"), [(4, False, "inductor"), (12, True, "aot_eager")])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_layer_compiles_without_a_graph_break(E, dynamic, backend, way):
    torch._dynamo.reset()
    case = inputs(E, lora=True)

    def layer(hidden, gate, mask, leaves):
        routing = route(hidden.sin(), gate, 2, mask=mask)
        out = moe_mlp(hidden.sin(), routing, *(ExpertLinear(*tensors) for tensors in leaves))
        return out.square().sum() + 0.01 * routing.balance_loss

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)):
        loss = function(*case)
        every = [case[0], case[1], *(tensor for tensors in case[3] for tensor in tensors)]
        results.append([loss.detach(), *torch.autograd.grad(loss, every)])
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.parametrize("E", [4, 12])
def test_opcheck(E):
    hidden, gate, mask, leaves = inputs(E)
    routing = route(hidden.detach(), gate.detach(), 2)  # of which all rows are written
    places, weights, weight = (routing.slots, routing.order), routing.weights, leaves[0][0].detach()
    rows = moe_dispatch.moe_dispatch(hidden.detach(), *places)
    torch.library.opcheck(moe_dispatch.moe_dispatch, (hidden, *places))
    torch.library.opcheck(moe_dispatch.moe_combine, (rows.clone().requires_grad_(), *places, weights.clone().requires_grad_()))
    torch.library.opcheck(moe_dispatch.moe_combine_backward, (hidden.detach(), rows, *places, weights))
    for given in ([weight], list(weight.unbind())):
        given = [part.clone().requires_grad_() for part in given]
        torch.library.opcheck(grouped_linear_forward, (rows.clone().requires_grad_(), given, routing.ends, False))
    torch.library.opcheck(grouped_outer, (rows @ weight[0].T, rows, [weight], routing.ends))


def test_bad_arguments_are_named():
    hidden, gate, mask, leaves = inputs(4)
    projections, routing = [ExpertLinear(*tensors) for tensors in leaves], route(hidden, gate, 1)
    with pytest.raises(ValueError, match=r"hidden must be \(29, H\) as it was routed, not \(28, 24\)"):
        moe_mlp(hidden[1:], routing, *projections)
    with pytest.raises(ValueError, match="up_proj must be of 4 experts as the routing is, not of 3"):
        moe_mlp(hidden, routing, projections[0], ExpertLinear(leaves[1][0][1:]), projections[2])


def _reference_module(golden):
    spec = importlib.util.spec_from_file_location("fill", golden / "uni_medvlm" / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_golden_layer_of_deepspeed(golden, way):
    """Output, and the gradients of input and gate, of both versions."""
    arrays = dict(np.load(golden / "uni_medvlm" / "moe_golden.npz"))
    described = json.loads((golden / "uni_medvlm" / "moe_golden.json").read_text())
    fill, tried = _reference_module(golden), 0
    for name, case in described["cases"].items():
        if not name.startswith("layer/") or not name.endswith("f32"):
            continue
        version, experts, choices, factor, _ = name.removeprefix("layer/").split("_")
        E, K = int(experts[1:]), int(choices[1:])

        def filled(key, shape):
            return torch.from_numpy(fill.tensor_for(f"deepspeed_moe.{key}", shape)).float()

        gate = (25 * filled("gate.wg.weight", (E, 64))).requires_grad_()
        shapes = {"gate_proj": (176, 64), "up_proj": (176, 64), "down_proj": (64, 176)}
        each = [
            [5 * filled(f"experts.deepspeed_experts.{e}.{key}.weight", shape) for e in range(E)] for key, shape in shapes.items()
        ]
        x = torch.from_numpy(fill.seeded(4001, (2, 48, 64))).float().requires_grad_()
        noise = torch.from_numpy(fill.seeded_uniform(5000 + E, (96, E)))
        options = {"priority": noise} if K == 1 else {"gshard": True}
        routing = route(x.flatten(0, 1), gate, K, capacity_factor=float(factor[2:]), **options)
        y = moe_mlp(x.flatten(0, 1), routing, *map(ExpertLinear, each)).view_as(x)
        loss = y.float().square().sum() + 0.01 * routing.balance_loss
        gradients = torch.autograd.grad(loss, (x, gate))
        assert abs(routing.balance_loss.item() - case["l_aux"]) < 1e-6, name
        ours = {"y": y[:, ::4, ::4], "gx": gradients[0][:, ::4, ::4], "gwg": gradients[1]}
        for key, value in ours.items():
            exact = torch.from_numpy(arrays[f"{name}/{key}"])
            assert (value - exact).abs().max() <= 1e-4 * exact.abs().max(), (name, key)
        tried += 1
    assert tried >= 16


@pytest.mark.triton
@pytest.mark.parametrize("E", [2, 5, 12])
@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_triton_bodies_equal_float64(options, E, in_rows, monkeypatch):
    monkeypatch.setattr(moe_dispatch, "BLOCK", 16)  # two blocks of columns
    hidden, gate, mask, leaves = inputs(E)
    double = [leaf.detach().double().requires_grad_() for leaf in (hidden, gate)]
    doubles = [[leaf.detach().double().requires_grad_() for leaf in tensors] for tensors in leaves]
    exact = run(moe_mlp_reference, route_reference, (*double, mask, doubles), **options)
    assert_close(run(moe_mlp, route, (hidden, gate, mask, leaves), **options), exact, 2e-5)


@pytest.mark.triton
def test_triton_bodies_clear_the_rows_of_nobody():
    hidden, gate, mask, _ = inputs(5)
    routing = route(hidden, gate, 2, mask=mask, capacity_factor=0.6)
    places, last = (routing.slots, routing.order), routing.ends[-1]
    assert last < 2 * S
    rows = moe_dispatch.moe_dispatch(hidden, *places)
    assert torch.equal(rows[:last], hidden[routing.order[:last].long() // 2]) and not rows[last:].any()
    grad_rows, grad_weights = moe_dispatch.moe_combine_backward(hidden, rows.detach(), *places, routing.weights.detach())
    assert not grad_rows[last:].any() and not grad_weights[routing.slots < 0].any()
