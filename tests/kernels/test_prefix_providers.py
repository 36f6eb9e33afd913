"""Other packages' attention over shared prompts. SDPA runs here; flash-attn and xformers need a GPU, so what they are asked for is
answered by the products that they document, in float64: segments, merging and gradients are tried, not their kernels.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kernels.partial_attention import attend, attend_backward
from kernels.prefix_attention import prefix_attention_reference
from kernels.prefix_providers import (
    PROVIDERS,
    own_segments,
    prefix_attention_by,
    prefix_attention_by_backward,
    prefix_attention_by_forward,
    prompt_segments,
    unusable,
)
from tests.kernels.test_prefix_attention import CASES, inputs, real_rows, run


def by_segments(q, k, v, queries, keys):
    """(rows, columns, query, key and value [1, h, tokens, d]) of each segment; q [N, h, d], k and v [M, k, d]."""
    for i in range(len(queries) - 1):
        rows, columns = slice(*queries[i : i + 2].tolist()), slice(*keys[i : i + 2].tolist())
        key, value = (x[columns].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)[None] for x in (k, v))
        yield rows, columns, q[rows].transpose(0, 1)[None], key, value


def varlen_forward(q, k, v, queries, keys, longest_query, longest_key, dropout, scale, causal):
    """As flash-attn documents it: l [h, N], and inf where a query sees nothing."""
    assert queries.dtype == keys.dtype == torch.int32 and dropout == 0.0
    assert longest_query >= queries.diff().max() and longest_key >= keys.diff().max()
    output, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:2], float("nan"), dtype=q.dtype).T
    for rows, _, *states in by_segments(q, k, v, queries, keys):
        o, sums = attend(*states, scale, causal)
        output[rows], lse[:, rows] = o[0].transpose(0, 1), sums[0].masked_fill(sums[0].isneginf(), float("inf"))
    return output, lse, None, None


def varlen_backward(grad, q, k, v, o, lse, dq, dk, dv, queries, keys, longest_query, longest_key, dropout, scale, causal, *rest):
    """As flash-attn documents it; what no segment reaches stays as it was. `rest`: no window, no cap, no slopes, deterministic."""
    assert rest in ((), (-1, -1, 0.0, None, torch.are_deterministic_algorithms_enabled()))
    share = q.shape[1] // k.shape[1]
    for x in (dq, dk, dv):
        x.fill_(float("nan"))
    for rows, columns, *states in by_segments(q, k, v, queries, keys):
        outside = (x[rows].transpose(0, 1)[None] for x in (grad, o))
        g, y = outside
        to_query, to_key, to_value = attend_backward(g, *states, y, lse[None, :, rows], scale, causal)
        dq[rows] = to_query[0].transpose(0, 1)
        for whole, part in ((dk, to_key), (dv, to_value)):
            whole[columns] = part[0].unflatten(0, (-1, share)).sum(1).transpose(0, 1)


class Bias:
    """xformers' block-diagonal masks: lengths of queries and of keys."""

    causal = False

    @classmethod
    def from_seqlens(cls, queries, keys, device):
        bias = cls()
        bias.ends = [torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (queries, keys)]
        bias.longest = [max(queries), max(keys)]
        return bias


class CausalBias(Bias):
    causal = True


def ungrouped(*tensors):
    """[N, h, d] of [1, N, k, h / k, d]; keys and values [M, k, d], all heads that share one being the same."""
    return [x[0].flatten(1, 2) if i % 3 == 0 else x[0, :, :, 0] for i, x in enumerate(tensors)]


def partial(query, key, value, attn_bias, scale, op):
    assert op == "forward" and (key.shape[3] == 1 or key.stride(3) == value.stride(3) == 0)
    output, lse, *_ = varlen_forward(
        *ungrouped(query, key, value), *attn_bias.ends, *attn_bias.longest, 0.0, scale, attn_bias.causal
    )
    return output.unflatten(1, query.shape[2:4])[None], lse.unflatten(0, query.shape[2:4])[None]


def partial_backward(grad, output, lse, query, key, value, attn_bias, scale, op):
    assert op == "backward"
    q, k, v = ungrouped(query, key, value)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    sums, ends, longest = lse[0].flatten(0, 1), attn_bias.ends, attn_bias.longest
    flat = (x[0].flatten(1, 2) for x in (grad, output))
    g, o = flat
    varlen_backward(g, q, k, v, o, sums, *gradients, *ends, *longest, 0.0, scale, attn_bias.causal)
    dq, dk, dv = (x.unflatten(1, (key.shape[2], -1)) for x in gradients)
    share = query.shape[3]
    return dq[None], *(x.expand(-1, -1, share, -1)[None] / share for x in (dk, dv))


@pytest.fixture
def packages(monkeypatch):
    """flash_attn and xformers, of what we ask them for."""
    flash, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = varlen_forward, varlen_backward
    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    xformers, ops, fmha, bias = (ModuleType(name) for name in names)
    bias.BlockDiagonalMask, bias.BlockDiagonalCausalMask = Bias, CausalBias
    fmha.memory_efficient_attention_partial, fmha.memory_efficient_attention_backward = partial, partial_backward
    fmha.flash, ops.fmha = SimpleNamespace(FwOp="forward", BwOp="backward"), fmha
    modules = [flash, interface, xformers, ops, fmha, bias]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_in_float64_each_is_the_reference(provider, case, packages, poisoned_memory):
    def by(*arguments):
        return prefix_attention_by(provider, *arguments)

    exact, ours = run(prefix_attention_reference, case, torch.float64), run(by, case, torch.float64)
    for name, x, y in zip(("output", "dq", "dk", "dv"), ours, exact, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_sdpa_in_float32_and_its_padding_is_zero():
    states, _, start = inputs(CASES[0], torch.float32)
    y = prefix_attention_by("sdpa", *states, CASES[0].P, CASES[0].G, start)
    exact = prefix_attention_reference(*(x.double() for x in states), CASES[0].P, CASES[0].G, start)
    torch.testing.assert_close(y, exact.float(), atol=2e-6, rtol=2e-6)
    assert (y.masked_select(~real_rows(CASES[0])) == 0).all()


def test_segments_of_a_row():
    starts = torch.tensor([0, 3])
    own, prompt = own_segments(starts, 5, 2, 11), prompt_segments(starts, 5, 2, 11)
    assert own.queries.diff().tolist() == own.keys.diff().tolist() == [0, 5, 3, 3, 3, 2, 3, 3]
    assert prompt.queries.diff().tolist() == [5, 6, 0, 5, 6, 0] and prompt.keys.diff().tolist() == [0, 5, 6, 3, 2, 6]
    assert (own.longest_query, prompt.longest_query) == (5, 6)


@pytest.mark.parametrize("provider", ["flash", "xformers"])
def test_the_ops_fulfil_their_contract(provider, packages):
    case = CASES[0]
    states, grad, start = inputs(case, torch.float64)
    states = [x.requires_grad_() for x in states]
    arguments = (*states, start, case.P, case.G, 0.1, provider)
    torch.library.opcheck(prefix_attention_by_forward, arguments, test_utils=("test_schema", "test_autograd_registration"))
    output, lse = prefix_attention_by_forward(*(x.detach() for x in states), *arguments[3:])
    backward = (grad, *(x.detach() for x in states), start, output, lse, case.P, case.G, 0.1, provider)
    torch.library.opcheck(prefix_attention_by_backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_each_refuses_what_ours_does(provider, packages):
    states, _, start = inputs(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="70 tokens are not a prompt of 37 and 4 answers"):
        prefix_attention_by(provider, *states, 37, 4, start)
    with pytest.raises(ValueError, match=r"start must be \[3\], not \[2\]"):
        prefix_attention_by(provider, *states, CASES[0].P, CASES[0].G, start[:2])


def test_what_cannot_be_had_is_said_in_one_line(packages, monkeypatch):
    assert unusable("prefix") is unusable("sdpa", torch.device("cpu"), half=False) is None
    with pytest.raises(ValueError, match="one of prefix, sdpa, flash, xformers, not 'ring'"):
        prefix_attention_by("ring", *inputs(CASES[0], torch.float32)[0], CASES[0].P, CASES[0].G)
    for provider in ("flash", "xformers"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        assert unusable(provider, torch.device("cuda")) is None
        assert "CUDA only" in unusable(provider, torch.device("cpu")) and "no float32" in unusable(provider, half=False)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "is not installed (pip install" in unusable(provider)
