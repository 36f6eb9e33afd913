"""The experts on the CPU: their ops, what only some projections have, dropout, and oneDNN's products."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import moe_cpu
from kernels.moe_cpu import COLUMNS, kept_rows, moe_mlp_cpu, moe_mlp_cpu_backward, product
from kernels.moe_dispatch import ExpertLinear, moe_mlp, moe_mlp_reference
from kernels.moe_router import route

pytestmark = pytest.mark.usefixtures("poisoned_memory")
S, H, INNER, R, E = 70, 24, 40, 8, 3
SHAPES = ((INNER, H), (INNER, H), (H, INNER))


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def leaves_of(lora: tuple[bool, ...], dtype=torch.float32) -> list[list[Tensor]]:
    """Weights of three projections, and LoRAs of some."""
    every = []
    for number, ((out, width), has) in enumerate(zip(SHAPES, lora, strict=True)):
        every.append([randn(E, out, width, seed=number, dtype=dtype)])
        if has:
            every[-1] += [randn(E, R, width, seed=7 + number, dtype=dtype), randn(E, out, R, seed=9 + number, dtype=dtype)]
    return every


def results(mlp, hidden, gate, linears, leaves, **options):
    out = mlp(hidden, route(hidden, gate, 2, **options), *linears)
    weigh = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weigh).sum(), leaves)]


def assert_close(ours, exact, tolerance=1e-5):
    for value, truth in zip(ours, exact, strict=True):
        assert (value.double() - truth.double()).norm() <= tolerance * truth.double().norm().clamp(min=1e-6)


@pytest.mark.parametrize("lora", [(True, False, False), (False, True, True), (False, False, False)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_some_projections_have_and_what_needs_no_gradient(lora, frozen, dtype):
    hidden, gate, leaves = randn(S, H, dtype=dtype), randn(E, H, seed=1, dtype=dtype), leaves_of(lora, dtype)
    if frozen:
        hidden = hidden.detach()
        leaves = [[tensors[0].detach(), *tensors[1:]] for tensors in leaves]
    linears = [ExpertLinear(*tensors, scale=0.5) if len(tensors) > 1 else ExpertLinear(*tensors) for tensors in leaves]
    learning = [t for t in (hidden, gate, *(t for tensors in leaves for t in tensors)) if t.requires_grad]
    exact = results(moe_mlp_reference, hidden, gate, linears, learning, mask=torch.arange(S) % 5 > 0)
    assert_close(results(moe_mlp, hidden, gate, linears, learning, mask=torch.arange(S) % 5 > 0), exact)


def test_one_expert_of_many_learns():
    hidden, gate, leaves = randn(S, H), randn(E, H, seed=1), leaves_of((True, True, True))
    each = [[list(part.detach().unbind()) for part in tensors] for tensors in leaves]
    chosen = [part[1].requires_grad_() for tensors in each for part in tensors]
    linears = [ExpertLinear(*tensors) for tensors in each]
    exact = results(moe_mlp_reference, hidden, gate, linears, chosen)
    assert_close(results(moe_mlp, hidden, gate, linears, chosen), exact)


class Calls(TorchDispatchMode):
    """Which backward ops run."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.vesalius.moe_mlp_cpu_backward.default:
            self.seen.append("backward")
        return function(*args, **(kwargs or {}))


def test_a_group_of_experts_has_its_gradients_before_the_next_is_begun():
    """Six experts are three groups of two: no more gradients than theirs are there beside what the parameters have."""
    hidden, gate = randn(S, H), randn(6, H, seed=1)
    each = [[randn(*shape, seed=10 * which + e) for e in range(6)] for which, shape in enumerate(SHAPES)]
    loss = moe_mlp(hidden, route(hidden, gate, 2), *(ExpertLinear(weights) for weights in each)).square().sum()
    seen: list = []
    for weights in each:
        for e, weight in enumerate(weights):
            weight.register_post_accumulate_grad_hook(lambda _, e=e: seen.append(e // 2))
    with Calls(seen):
        loss.backward()
    assert seen == ["backward", *[2] * 6, "backward", *[1] * 6, "backward", *[0] * 6]


@pytest.mark.parametrize("inner", [COLUMNS - 4, COLUMNS + 4, 3 * COLUMNS])
def test_every_block_of_inner_columns_counts_once(inner):
    """Also a last one that is narrower."""
    hidden, gate, r = randn(S, 8), randn(E, 8, seed=1), 4
    shapes = ((inner, 8), (inner, 8), (8, inner))
    leaves = [
        [randn(E, *shape, seed=which), randn(E, r, shape[1], seed=3 + which), randn(E, shape[0], r, seed=6 + which)]
        for which, shape in enumerate(shapes)
    ]
    linears, learning = (
        [ExpertLinear(*tensors, scale=0.5) for tensors in leaves],
        [hidden, gate, *(t for every in leaves for t in every)],
    )
    assert_close(results(moe_mlp, hidden, gate, linears, learning), results(moe_mlp_reference, hidden, gate, linears, learning))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_dropout_is_that_of_the_same_masks_by_autograd(share, monkeypatch):
    hidden, gate, leaves = randn(S, H), randn(E, H, seed=1), leaves_of((True, True, True))
    linears = [ExpertLinear(*tensors, scale=0.5, dropout=share) for tensors in leaves]
    learning = [hidden, gate, *(t for tensors in leaves for t in tensors)]
    drawn = []

    def draw(self, p, real=Tensor.bernoulli_):
        drawn.append(real(self, p))
        return drawn[-1]

    monkeypatch.setattr(Tensor, "bernoulli_", draw)
    torch.manual_seed(0)
    ours = results(moe_mlp, hidden, gate, linears, learning)
    ends, turn = [0, *route(hidden, gate, 2).ends.tolist()], iter(range(3 * E))

    def dropout(x, p):  # the reference asks for gate, up and down of each expert
        e, which = divmod(next(turn), 3)
        assert p == share
        return x * drawn[which][ends[e] : ends[e + 1]] / (1 - share)

    monkeypatch.setattr(F, "dropout", dropout)
    assert_close(ours, results(moe_mlp_reference, hidden, gate, linears, learning))
    assert abs(drawn[0].float().mean() - (1 - share)) < 0.05 and not torch.equal(drawn[0], drawn[1])


def test_a_second_backward_finds_what_the_first_left():
    hidden, gate, leaves = randn(S, H), randn(E, H, seed=1), leaves_of((True, True, True))
    learning = [hidden, gate, *(t for tensors in leaves for t in tensors)]
    out = moe_mlp(hidden, route(hidden, gate, 2), *(ExpertLinear(*tensors) for tensors in leaves)).square().sum()
    first = torch.autograd.grad(out, learning, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, torch.autograd.grad(out, learning), strict=True))


def test_nothing_is_kept_where_no_gradient_is_asked_for(monkeypatch):
    hidden, gate, leaves = randn(S, H), randn(E, H, seed=1), leaves_of((False, False, False))
    linears, sizes, real = [ExpertLinear(*tensors) for tensors in leaves], [], torch.ops.vesalius.moe_mlp_cpu

    def watched(*given):
        out = real(*given)
        sizes.append(out[1].numel() + out[2].numel())
        return out

    monkeypatch.setattr("kernels.moe_dispatch.moe_mlp_cpu", watched)
    with torch.no_grad():
        quiet = moe_mlp(hidden, route(hidden, gate, 2), *linears)
    assert sizes == [0] and torch.equal(quiet, moe_mlp(hidden, route(hidden, gate, 2), *linears)) and sizes[1] > 0


def test_a_token_that_is_no_number_stays_alone():
    """Rows are filled up to a step: with zeros, not with what another token holds."""
    hidden, gate, leaves = randn(S, H).detach(), randn(E, H, seed=1), leaves_of((False, False, False))
    mask = torch.arange(S) > 0
    clean = results(moe_mlp, hidden, gate, [ExpertLinear(*t) for t in leaves], [t for (t,) in leaves], mask=mask)
    hidden[0] = float("nan")
    spoiled = results(moe_mlp, hidden, gate, [ExpertLinear(*t) for t in leaves], [t for (t,) in leaves], mask=mask)
    assert all(torch.equal(one, two) for one, two in zip(clean, spoiled, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (33, 70, 5), (64, 8, 96)])
def test_products_equal_float64(sizes, transposed):
    n, width, out = sizes
    x, w = randn(n, width).detach(), randn(out, width, seed=1).detach()
    if transposed:
        x, w = x.T.contiguous().T, w.T.contiguous().T
    exact = x.double() @ w.double().T
    assert (product(x, w) - exact).norm() <= 1e-6 * exact.norm()


def test_products_are_onednns_or_torchs(monkeypatch):
    hidden, gate, leaves = randn(S, H), randn(E, H, seed=1), leaves_of((True, True, True))
    linears, learning = [ExpertLinear(*tensors) for tensors in leaves], [hidden, *(t for tensors in leaves for t in tensors)]
    exact = results(moe_mlp_reference, hidden, gate, linears, learning)
    for answer in {False, hasattr(torch.ops.mkldnn, "_linear_pointwise")}:
        monkeypatch.setattr(moe_cpu, "has_onednn", lambda _, answer=answer: answer)
        assert_close(results(moe_mlp, hidden, gate, linears, learning), exact)


@pytest.mark.parametrize("listed", [False, True])
def test_opcheck(listed):
    hidden, gate, leaves = randn(S, H), randn(E, H, seed=1), leaves_of((True, False, True))
    routing = route(hidden.detach(), gate.detach(), 2)
    base, lora = [tensors[0] for tensors in leaves], [part for tensors in leaves for part in tensors[1:]]
    if listed:
        base, lora = ([e.detach().clone().requires_grad_() for part in parts for e in part] for parts in (base, lora))
    weights, options = routing.weights.clone().requires_grad_(), ([True, False, True], [0.5, 1.0, 2.0], [0.5, 0.0, 0.0])
    masks = [torch.arange(2 * S * H).view(2 * S, H) % 3 > 0]
    given = (hidden, weights, routing.order, routing.ends, base, lora, masks, *options)
    # with all rows written: a and b have some that nobody fills, which opcheck would compare
    torch.library.opcheck(moe_mlp_cpu, (*given, 0, 0), test_utils=("test_schema", "test_faketensor"))
    plain = [[t.detach() for t in part] if isinstance(part, list) and torch.is_tensor(part[0]) else part for part in given]
    plain[:2] = [hidden.detach(), weights.detach()]
    out, a, b = moe_mlp_cpu(*plain, 0, kept_rows(routing.order, routing.ends, 0, E, hidden.dtype))
    a, b = a.nan_to_num(), b.nan_to_num()
    needed = [True, False, *[number % 2 == 0 for number in range(len(base) + len(lora))]]
    torch.library.opcheck(moe_mlp_cpu_backward, (out.cos(), *plain[:4], a, b, *plain[4:], 0, needed))


@pytest.mark.parametrize("block", ["rows", "columns"])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_layout_of_a_weight_has_a_slow_product(block, transposed):
    """Plain loops, which oneDNN falls back to for layouts that it has no code for, take some thousand times as long."""
    weight, n = randn(256, 768), 256
    w = weight[:, :256] if block == "columns" else weight[:128]
    w = w.T if transposed else w
    x, whole = randn(n, w.shape[1]), w.contiguous()

    def seconds(matrix):
        product(x, matrix)
        start = time.process_time()
        for _ in range(5):
            product(x, matrix)
        return time.process_time() - start

    exact = x.double() @ w.double().T
    assert (product(x, w) - exact).norm() < 1e-6 * exact.norm()
    assert min(seconds(w) for _ in range(3)) < 20 * max(seconds(whole) for _ in range(3))
