"""Shared-prefix attention: outputs and gradients against float64, what it keeps, and the Triton bodies in the interpreter.

TRITON_INTERPRET=1 pytest -m triton tests/kernels/test_prefix_attention.py
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import partial_attention
from kernels import prefix_attention as module
from kernels.prefix_attention import (
    prefix_attention,
    prefix_attention_backward,
    prefix_attention_forward,
    prefix_attention_reference,
)
from kernels.prefix_attention_eager import attend_by_parts, gradients_by_parts
from tests.kernels.largest import Largest


class Case(NamedTuple):
    """Sizes of rows, and the padding of each prompt."""

    P: int
    G: int
    T: int
    h: int
    k: int
    d: int
    starts: tuple[int, ...] = (0,)


CASES = [
    Case(37, 3, 11, 4, 2, 64, (0, 5, 36)),  # ragged: one prompt is a single token
    Case(40, 7, 5, 4, 1, 80, (0, 36)),  # tiles hold several answers
    Case(65, 1, 67, 3, 1, 96),  # one answer, longer than a tile
    Case(19, 4, 1, 3, 3, 128, (2, 0)),  # one token each, a key head a query head
    Case(1, 2, 1, 2, 1, 64),  # one token everywhere
    Case(33, 0, 0, 4, 2, 64, (7, 0)),  # prompts alone
]


def inputs(case, dtype, seed=0):
    """query, key and value as a model has them, views of [B, S, heads, d]; the gradient of the output; where prompts start."""
    generator = torch.Generator().manual_seed(seed)
    B, S = len(case.starts), case.P + case.G * case.T
    q, k, v, grad = (torch.randn(B, S, heads, case.d, generator=generator).to(dtype) for heads in (case.h, case.k, case.k, case.h))
    return [x.transpose(1, 2) for x in (q, k, v)], grad, torch.tensor(case.starts)


def run(function, case, dtype):
    """The output and the three gradients, computed in `dtype` from the values that bfloat16 and float16 both hold."""
    states, grad, start = inputs(case, torch.float32)
    states, grad = [x.bfloat16().half().to(dtype) for x in states], grad.bfloat16().half().to(dtype)
    grad *= real_rows(case).to(dtype)
    leaves = [x.detach().requires_grad_() for x in states]
    y = function(*leaves, case.P, case.G, start)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def real_rows(case):
    """[B, S, 1, 1]: whether a token is none of the padding."""
    tokens = torch.arange(case.P + case.G * case.T)
    return (tokens >= torch.tensor(case.starts)[:, None])[..., None, None]


def assert_as_exact_as_the_reference(case, dtype):
    """At most twice the eager error against float64, and rounding of the terms of each sum.

    The terms, not their sum, are what rounding is relative to. At a softmax over one key dq and dk are exactly 0, the difference of
    do . v and do . o, two equal sums of d products of normal numbers: about d^1/2, and 1 after the scale d^-1/2.
    """
    exact, eager, ours = (
        run(prefix_attention_reference, case, torch.float64),
        *(run(function, case, dtype) for function in (prefix_attention_reference, prefix_attention)),
    )
    for name, x, y, z in zip(("output", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        assert x.shape == z.shape and x.dtype == dtype
        allowed = 2 * (y - z).abs().max() + 4 * torch.finfo(dtype).eps * max(z.abs().max().item(), 1.0)
        assert (x - z).abs().max() <= allowed, f"{name}: {(x - z).abs().max():.2e} > {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_against_float64(case, dtype, poisoned_memory):
    assert_as_exact_as_the_reference(case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_in_float64_it_is_the_reference(case, poisoned_memory):
    for ours, exact in zip(*(run(f, case, torch.float64) for f in (prefix_attention, prefix_attention_reference)), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies bfloat16 as if it were integers
@pytest.mark.parametrize("case", CASES)
def test_the_triton_bodies_against_float64(case, dtype, poisoned_memory):
    assert_as_exact_as_the_reference(case, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("programs", [1, 1000])
def test_query_heads_that_share_a_key_head_are_split_over_programs(programs, monkeypatch, poisoned_memory):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    assert_as_exact_as_the_reference(Case(21, 2, 6, 6, 1, 64, (3,)), torch.float32)


@pytest.mark.parametrize("case", CASES[:2])
def test_a_gpu_without_triton_computes_the_same_parts(case, monkeypatch, poisoned_memory):
    """By products instead of PyTorch's flash kernel, which a CPU alone has."""
    monkeypatch.setattr(partial_attention, "_has_flash", lambda query: False)
    assert_as_exact_as_the_reference(case, torch.float32)


def test_padding_is_zero_and_reaches_nothing():
    case = Case(20, 2, 4, 4, 2, 64, (6,))
    clean, broken = inputs(case, torch.float32), inputs(case, torch.float32)
    for x in broken[0]:
        x[:, :, :6] = torch.nan
    for (states, _, start), expected in ((clean, None), (broken, clean)):
        leaves = [x.requires_grad_() for x in states]
        y = prefix_attention(*leaves, case.P, case.G, start)
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        assert not y[:, :6].any() and not any(x[:, :, :6].any() for x in gradients)
        if expected:
            torch.testing.assert_close(y, prefix_attention(*expected[0], case.P, case.G, start))


class Kept:
    """Storages that autograd keeps within it, by address."""

    def __enter__(self):
        self.bytes = {}
        self.hooks = saved_tensors_hooks(self.keep, lambda x: x)
        self.hooks.__enter__()
        return self

    def keep(self, x):
        self.bytes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def test_what_it_keeps_at_3b_are_its_inputs_and_one_number_a_query():
    """P = 700, G = 8, T = 256, 16 query and 2 key heads of 128 in bfloat16: one prompt in one layer.

    Counted are distinct storages, whole, that autograd saves while the op runs, less those that the output projection saves too
    (its input, which the op keeps as o): 14.2 MB. With o they are 25.5 MB (24.3 MiB).
    """
    S, h, k, d = 700 + 8 * 256, 16, 2, 128
    weight = torch.randn(64, h * d, dtype=torch.bfloat16, requires_grad=True)
    q, k_, v = (torch.randn(1, S, n, d, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2) for n in (h, k, k))
    with Kept() as ours:
        y = prefix_attention(q, k_, v, 700, 8, torch.tensor([13]))
    with Kept() as projection:
        F.linear(y.flatten(2), weight)
    states = {x.untyped_storage().data_ptr() for x in (q, k_, v)}
    assert states < set(ours.bytes)  # as they are, not as copies
    assert y.untyped_storage().data_ptr() in set(ours.bytes) & set(projection.bytes)
    alone = sum(size for place, size in ours.bytes.items() if place not in projection.bytes)
    assert alone == 2 * S * (h + 2 * k) * d + 4 * h * S + 8  # and where the prompt starts
    assert alone < 14.3e6 and sum(ours.bytes.values()) < 25 * 2**20


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
def test_on_a_cpu_no_key_is_copied_for_an_answer_or_a_head(heads):
    """Nothing is made that is larger than the output, and keys repeated for 6 answers, or concatenated with theirs, would be."""
    case = Case(60, 6, 2, *heads, 64)
    (q, k, v), grad, start = inputs(case, torch.float32)
    output, lse = torch.zeros_like(grad), torch.zeros(1, case.h, 72)
    assert 6 * 62 * case.k * 64 > output.numel()
    with Largest() as watched:
        attend_by_parts(q, k, v, start, case.P, case.G, 0.1, output, lse)
        gradients_by_parts(grad, q, k, v, start, output, lse, case.P, case.G, 0.1)
    assert 0 < watched.elements <= output.numel()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_whole_with_lengths_as_symbols(backend):
    torch._dynamo.reset()

    def layer(q, k, v, P, G, start):
        return 2 * prefix_attention(q * 2, k, v.tanh(), P, G, start)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for case in (Case(9, 2, 5, 4, 2, 64, (0, 3)), Case(12, 2, 7, 4, 2, 64, (1, 2))):
        results = []
        for function in (layer, compiled):
            states, grad, start = inputs(case, torch.float32)
            leaves = [x.requires_grad_() for x in states]
            y = function(*leaves, case.P, case.G, start)
            results.append([y, *torch.autograd.grad(y, leaves, grad)])
        for ours, eager in zip(*reversed(results), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_opcheck():
    case = Case(9, 2, 3, 4, 2, 64, (0, 3))
    states, grad, start = inputs(case, torch.float32)
    arguments = (start, case.P, case.G, 0.125)
    torch.library.opcheck(prefix_attention_forward, (*(x.requires_grad_() for x in states), *arguments))
    with torch.no_grad():
        output, lse = prefix_attention_forward(*states, *arguments)
    plain = [x.detach() for x in states]
    torch.library.opcheck(prefix_attention_backward, (grad, *plain, start, output, lse, *arguments[1:]))


def test_on_cuda_it_is_traced_with_its_gradients():
    """Fake tensors: there is no GPU here."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 30, n, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (16, 2, 2))
        start = torch.zeros(2, dtype=torch.int64, device="cuda")

        def both(q, k, v, start):
            y, lse = prefix_attention_forward(q, k, v, start, 14, 4, 0.1)
            return y, *prefix_attention_backward(y, q, k, v, start, y, lse, 14, 4, 0.1)

        traced = make_fx(both)(q, k, v, start)
        names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
        y, *gradients = both(q, k, v, start)
    assert [name for name in names if "getitem" not in name] == [
        "vesalius.prefix_attention.default",
        "vesalius.prefix_attention_backward.default",
    ]
    assert y.shape == (2, 30, 16, 128) and y.is_cuda and y.dtype == torch.bfloat16
    assert [x.transpose(1, 2).shape for x in gradients] == [q.shape, k.shape, v.shape] and all(x.is_cuda for x in gradients)


def test_under_autocast_it_computes_in_autocasts_type():
    """As SDPA does: rotated queries and keys come in float32 there."""
    (q, k, v), _, start = inputs(Case(9, 2, 3, 4, 2, 64), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = prefix_attention(q, k, v, 9, 2, start)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, prefix_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 9, 2, start))
    assert prefix_attention(q, k, v.bfloat16(), 9, 2, start).dtype == torch.bfloat16


def test_wrong_shapes_are_named():
    q, k, start = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"query, key and value must be .* not \[2, 4, 9, 16\], \[2, 3, 9, 16\]"):
        prefix_attention(q, torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16), 5, 2)
    with pytest.raises(ValueError, match="key and value must have the prompts, tokens and head size of query"):
        prefix_attention(q, k[:, :, :8], k[:, :, :8], 5, 2)
    for P, G in ((5, 3), (10, 0), (5, 0), (-1, 2)):
        with pytest.raises(ValueError, match=f"9 tokens are not a prompt of {P} and {G} answers of one length"):
            prefix_attention(q, k, k, P, G)
    with pytest.raises(ValueError, match=r"start must be \[2\], not \[1\]"):
        prefix_attention(q, k, k, 5, 2, start[:1])
