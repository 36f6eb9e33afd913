"""A layer of experts against a loop over tokens in float64 and against DeepSpeed's; what padding, capacity and adapters do."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.moe_router import route
from models.uni_medvlm.experts import MixtureOfExperts, RoutingOptions, SwiGLU, present_keys
from models.uni_medvlm.projections import PROJECTIONS
from tests.models.sam.conftest import Golden

B, T, H, E = 1, 23, 6, 4
S = B * T


@pytest.fixture(scope="module")
def deepspeed(golden):
    return Golden(golden / "uni_medvlm", "moe_golden")


def adapted(expert, seed, dropout=0.0):
    """With a LoRA that is not zero."""
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, target_modules=list(PROJECTIONS))
    expert, generator = inject_adapter_in_model(config, expert), torch.Generator().manual_seed(seed)
    for name, parameter in expert.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return expert


def layer_of(options, *, lora=None, dtype=torch.float64, dropout=0.0):
    """A mixture in training, all experts unlike each other, with float64 routers."""
    torch.manual_seed(4)
    experts = [SwiGLU(H, 8).to(dtype) for _ in range(E)]
    if lora:
        experts = [adapted(expert, seed, dropout) for seed, expert in enumerate(experts)]
    layer = MixtureOfExperts(experts, H, options)
    layer.router.data = torch.randn(E, H, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    return layer


def states(dtype=torch.float64):
    return torch.randn(B, T, H, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype).requires_grad_()


def run(layer, hidden, real=None):
    """Output, both losses and the gradient of every leaf."""
    layer.ledger.begin(real)
    y = layer(hidden)
    routing = layer.ledger.routings[0]
    leaves = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    got = torch.autograd.grad(y.square().sum() + 0.3 * routing.balance_loss + 0.2 * routing.z_loss, leaves)
    return [y, routing.balance_loss, routing.z_loss, *got]


def by_loops(layer, hidden, real):
    """(output, balance, z, dropped), one token after the other; who is dropped is decided with lists."""
    hidden, gate, experts, options = hidden.flatten(0, 1), layer.router, layer.experts, layer.options
    probs = [torch.softmax(gate @ x, 0) for x in hidden]
    choices = {s: sorted(range(E), key=lambda e, s=s: -probs[s][e].item())[: options.top_k] for s in range(S) if real[s]}
    counts = [sum(e in chosen for chosen in choices.values()) for e in range(E)]
    takes = {}
    for e in range(E):
        askers = [s for s in choices if e in choices[s]]
        if options.drop == "probs":
            askers.sort(key=lambda s, e=e: -probs[s][e].item())
        if options.capacity_factor is not None:
            capacity = int(np.ceil(S * options.capacity_factor * options.top_k / E))
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
    return torch.stack(rows)[None], balance, z, sum(counts) - sum(map(len, takes.values()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("capacity_factor, drop", [(None, "position"), (0.6, "position"), (0.6, "probs")])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(lora, top_k, capacity_factor, drop, renormalize, padded):
    layer = layer_of(RoutingOptions(top_k, capacity_factor, drop=drop, renormalize=renormalize), lora=lora)
    hidden, real = states(), torch.ones(B, T, dtype=torch.bool)
    if padded:
        real[0, [0, 1, 7, 22]] = False
    leaves = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(leaves) == 2 + 3 * E * (1 + lora)
    expected, balance, z, dropped = by_loops(layer, hidden, real.flatten().tolist())
    wanted = torch.autograd.grad(expected.square().sum() + 0.3 * balance + 0.2 * z, leaves)
    ours = run(layer, hidden, real if padded else None)
    for actual, right in zip(ours, (expected, balance, z, *wanted), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-10)
    routing = layer.ledger.routings[0]
    assert routing.counts.sum() - (routing.slots >= 0).sum() == dropped and (dropped > 0 or capacity_factor is None)
    assert not ours[0][~real].any() and (routing.slots[~real.flatten()] == -1).all()


def test_an_expert_takes_at_least_the_least_capacity():
    for least, most in ((0, 3), (5, 5)):  # ceil(0.25 * 2 * 23 / 4) = 3
        layer = layer_of(RoutingOptions(2, 0.25, min_capacity=least))
        layer(states())
        ends = layer.ledger.routings[0].ends
        assert ends.diff(prepend=ends.new_zeros(1)).max() == most


def test_what_padding_holds_changes_nothing():
    hidden, real = states(), torch.arange(T)[None] < 15
    other = torch.where(real[..., None], hidden, 100 * torch.rand(B, T, H))
    layer, results = layer_of(RoutingOptions(2, 0.7)), []
    for x in (hidden, other):
        layer.ledger.begin(real)
        results.append([layer(x), *layer.ledger.routings[0]._replace(logits=torch.empty(0))])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    layer = layer_of(RoutingOptions(2))
    layer.ledger.begin(real)
    padded = layer(hidden)[:, :15], layer.ledger.routings[0].balance_loss
    layer.ledger.begin()
    torch.testing.assert_close(padded, (layer(hidden[:, :15]), layer.ledger.routings[0].balance_loss))


def test_nothing_but_padding_gives_zeros_and_finite_losses():
    layer, hidden = layer_of(RoutingOptions(2, 1.0)), states()
    y, balance, _, *gradients = run(layer, hidden, torch.zeros(B, T, dtype=torch.bool))
    assert not y.any() and balance == 0 and all(gradient.isfinite().all() for gradient in gradients)


def test_the_router_decides_in_float32_under_autocast_and_in_bfloat16():
    hidden = states(torch.float32)
    layer, half = (layer_of(RoutingOptions(2), lora=True, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    half.router.data = layer.router.data
    half(hidden.bfloat16())
    weights = half.ledger.routings[0].weights
    layer.ledger.begin()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(hidden.bfloat16())
    routing = layer.ledger.routings[0]
    assert routing.weights.dtype == torch.float32 and torch.equal(routing.weights, weights) and y.dtype == torch.bfloat16


def test_float32_adapters_on_bfloat16_experts_compute_in_float32():
    """As PEFT's do: their product is rounded once, when it is added."""
    layer = layer_of(RoutingOptions(1, renormalize=False), lora=True, dtype=torch.bfloat16)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() + 1e-3
    hidden = states(torch.bfloat16)
    y = layer(hidden)
    routing, tokens = layer.ledger.routings[0], hidden.flatten(0, 1)
    expected = torch.stack([routing.weights[s, :1] * layer.experts[routing.experts[s, 0]](tokens[s]) for s in range(S)])
    torch.testing.assert_close(y[0].float(), expected, rtol=2e-2, atol=1e-2)
    y.float().sum().backward()
    assert {p.grad.dtype for name, p in layer.named_parameters() if "lora_" in name} == {torch.float32}


def test_an_expert_without_tokens_has_gradients_of_zero():
    layer = layer_of(RoutingOptions(1), lora=True)
    layer.router.data.zero_()
    layer.router.data[0], layer.router.data[1] = 1, -1  # one of the two always wins
    layer(states()).sum().backward()
    learning = [p for p in layer.experts[3].parameters() if p.requires_grad]
    assert learning and all(p.grad is not None and not p.grad.any() for p in learning)


def test_adapters_that_are_off_or_merged_or_exchanged_are_so_in_the_kernel():
    layer, hidden = layer_of(RoutingOptions(2), lora=True).eval(), states()
    plain = MixtureOfExperts([copy.deepcopy(expert) for expert in layer.experts], H, layer.options).eval()
    plain.router = layer.router
    with torch.no_grad():
        on = layer(hidden)
        loras = [module for module in layer.modules() if hasattr(module, "enable_adapters")]
        for module in loras:
            module.enable_adapters(False)
        off = layer(hidden)
        for module in loras:
            module.enable_adapters(True)
            module.merge()
        merged = layer(hidden)
        for expert in plain.experts:
            for name in PROJECTIONS:
                setattr(expert, name, getattr(expert, name).base_layer)
        torch.testing.assert_close(merged, on)
        torch.testing.assert_close(off, plain(hidden))
        assert not torch.allclose(on, off)
        for module in loras:
            module.enable_adapters(False)  # PEFT takes a merged adapter out again
        torch.testing.assert_close(layer(hidden), off)


def test_dropout_of_adapters_is_in_training_only_and_in_the_mean_nothing():
    layer, hidden = layer_of(RoutingOptions(1, renormalize=False), lora=True, dropout=0.3), states()
    for expert in layer.experts:  # one adapter alone, the outermost: the output is linear in what it drops
        for name in ("gate_proj", "up_proj"):
            setattr(expert, name, getattr(expert, name).base_layer)
    with torch.no_grad():
        exact = layer.eval()(hidden)
        assert torch.equal(layer(hidden), exact)
        layer.train()
        torch.manual_seed(0)
        draws = torch.stack([layer(hidden) for _ in range(2000)])
    assert draws.std(0).max() > 1e-3
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 2000**0.5 + 1e-9).all()


def test_a_checkpointed_layer_with_dropout_has_the_gradients_of_a_plain_one():
    layer, hidden = layer_of(RoutingOptions(2, 0.8), lora=True, dropout=0.3), states()
    results = []
    for checkpointed in (False, True):
        layer.zero_grad()
        layer.ledger.begin()
        torch.manual_seed(1)
        y = checkpoint(layer, hidden, use_reentrant=False) if checkpointed else layer(hidden)
        (y.square().sum() + layer.ledger.auxiliary_loss(0.1, 0.1)).backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("lora", [False, True])
def test_a_layer_compiles_without_a_graph_break(lora):
    layer, hidden = layer_of(RoutingOptions(2, 0.8), lora=lora), states()
    real = torch.arange(T)[None] < 20
    expected = run(layer, hidden, real)
    torch._dynamo.reset()
    compiled = copy.deepcopy(layer)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the ledger has other contents the second time
        for actual, right in zip(run(compiled, hidden, real), expected, strict=True):
            torch.testing.assert_close(actual, right)
    assert compiled.ledger.counts().sum() == 2 * 2 * 20


def test_options_that_cannot_be_are_refused():
    for wrong, message in (
        ({"top_k": 0}, "top_k must be 1 to 16, not 0"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive or None, not 0.0"),
        ({"drop": "random"}, "drop must be 'position' or 'probs', not 'random'"),
    ):
        with pytest.raises(ValueError, match=message):
            RoutingOptions(**wrong)


def test_experts_that_the_kernel_cannot_run_are_refused():
    biased, activated = SwiGLU(H, 8), SwiGLU(H, 8)
    biased.up_proj = nn.Linear(H, 8)
    activated.act_fn = nn.GELU()
    for experts, message in (
        ([SwiGLU(H, 8)], "top_k is 2, and there are 1 experts"),
        ([SwiGLU(H, 8), biased], "an expert's up_proj must be a linear layer without bias"),
        ([SwiGLU(H, 8), activated], "an expert's activation must be SiLU, not GELU"),
        ([SwiGLU(H, 8), SwiGLU(H, 9)], r"experts must be of width 6 and one inner width, not \[\(6, 8\), \(6, 9\)\]"),
        ([SwiGLU(8, 8)] * 2, "experts must be of width 6"),
        ([nn.Linear(H, H)] * 2, "an expert's gate_proj must be a linear layer"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureOfExperts(experts, H)
    with pytest.raises(ValueError, match="a mixture has 2 to 256 experts, not 1"):
        MixtureOfExperts([SwiGLU(H, 8)], H, RoutingOptions(1))
    unlike = MixtureOfExperts([adapted(SwiGLU(H, 8), 0), SwiGLU(H, 8)], H)
    with pytest.raises(ValueError, match="experts must have adapters of one rank, scale and dropout"):
        unlike(states(torch.float32))


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
    first = route(x.flatten(0, 1), layer.router, 1).balance_loss  # DeepSpeed's top-2 counts first choices only
    (y.square().sum() + 0.01 * first).backward()
    golden = f"layer/{name}_cf1.5_f32"
    for part, tensor in (("y", y[:, ::4, ::4]), ("gx", x.grad[:, ::4, ::4]), ("gwg", layer.router.grad)):
        assert deepspeed.error(f"{golden}/{part}", tensor) < 1e-4 * abs(deepspeed.arrays[f"{golden}/{part}"]).max(), part
    assert first.item() == pytest.approx(deepspeed.facts["cases"][golden]["l_aux"], abs=1e-6)
