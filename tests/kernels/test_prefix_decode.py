"""A decode step over shared prompts: against float64, ragged groups, and the Triton bodies in the interpreter.

TRITON_INTERPRET=1 pytest -m triton tests/kernels/test_prefix_decode.py
"""

from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import partial_attention
from kernels import prefix_decode as module
from kernels.prefix_decode import prefix_decode, prefix_decode_op, prefix_decode_reference
from tests.kernels.largest import Largest


class Case(NamedTuple):
    """Sizes; how many rows answer each prompt, and where it starts; room for answers, and the newest token's place."""

    P: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    h: int
    k: int
    d: int
    room: int = 12
    position: int = 4


CASES = [
    Case(130, (2, 0, 5), (0, 40, 129), 8, 2, 64),  # a prompt without rows, one of a single token
    Case(77, (8, 8), (5, 0), 4, 1, 80, room=70, position=66),
    Case(40, (1,), (0,), 6, 6, 96, position=0),  # one row, its first token, no heads shared
    Case(33, (3, 1), (1, 2), 12, 1, 128, room=1, position=0),
    Case(1, (1, 1), (0, 0), 2, 1, 64),
]


def inputs(case, dtype, poison=True):
    """The tensors, keys as a model has them: views of [B, P, k, d]. Room that is not filled holds NaN."""
    generator = torch.Generator().manual_seed(0)
    B, N = len(case.rows), sum(case.rows)

    def randn(*shape):
        return torch.randn(shape, generator=generator).bfloat16().half().to(dtype)

    prompt = [randn(B, case.P, case.k, case.d).transpose(1, 2) for _ in range(2)]
    own = [randn(N, case.k, case.room, case.d) for _ in range(2)]
    if poison:
        for x in own:
            x[:, :, case.position + 1 :] = torch.nan
    bounds = torch.tensor([0, *case.rows]).cumsum(0).int()
    return [randn(N, case.h, 1, case.d), *prompt, *own, bounds, torch.tensor(case.starts), torch.tensor([case.position])]


def assert_as_exact_as_the_reference(case, dtype):
    tensors = inputs(case, dtype)
    exact = prefix_decode_reference(*(x.double() if x.is_floating_point() else x for x in tensors))
    eager, ours = prefix_decode_reference(*tensors), prefix_decode(*tensors, most_rows=max(case.rows))
    assert ours.shape == exact.shape == (sum(case.rows), 1, case.h, case.d) and ours.dtype == dtype
    allowed = 2 * (eager - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed, f"{(ours - exact).abs().max():.2e} > {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype, poisoned_memory):
    assert_as_exact_as_the_reference(case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_in_float64_it_is_the_reference(case, poisoned_memory):
    tensors = inputs(case, torch.float64)
    torch.testing.assert_close(prefix_decode(*tensors), prefix_decode_reference(*tensors), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("case", CASES[:2])
def test_a_gpu_without_triton_computes_the_same_parts(case, monkeypatch, poisoned_memory):
    monkeypatch.setattr(partial_attention, "_has_flash", lambda query: False)
    assert_as_exact_as_the_reference(case, torch.float32)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies bfloat16 as if it were integers
@pytest.mark.parametrize("case", CASES)
def test_the_triton_bodies_against_float64(case, dtype, poisoned_memory):
    assert_as_exact_as_the_reference(case, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("programs", [1, 10000])
def test_parts_of_a_prompt_and_blocks_of_its_rows_give_the_whole(programs, monkeypatch, poisoned_memory):
    """One part, and as many as a prompt has; queries for three blocks, of which a prompt with fewer rows leaves some empty."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    assert_as_exact_as_the_reference(Case(200, (11, 3), (0, 150), 4, 1, 64), torch.float32)


def test_padding_is_not_read():
    case = Case(20, (2, 1), (6, 0), 4, 2, 64)
    tensors = inputs(case, torch.float32)
    expected = prefix_decode(*tensors)
    for x in tensors[1:3]:
        x[0, :, :6] = torch.nan
    assert torch.equal(prefix_decode(*tensors), expected)


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
def test_on_a_cpu_no_key_is_copied(heads):
    """Nothing is made that is larger than the queries, and one prompt's keys or a row's own are as many."""
    case = Case(100, (8, 8), (3, 0), *heads, 64, room=40, position=38)
    tensors = inputs(case, torch.float32)
    with Largest() as watched:
        module._decode_by_prompt(tensors[0][:, :, 0], *tensors[1:], 0.1)
    assert 0 < watched.elements <= tensors[0].numel() < tensors[1][0].numel()


def test_opcheck_and_a_whole_graph():
    torch._dynamo.reset()
    tensors = inputs(CASES[0], torch.float32, poison=False)
    torch.library.opcheck(prefix_decode_op, (tensors[0][:, :, 0], *tensors[1:], 5, 0.125))

    def step(*tensors):
        return prefix_decode(*tensors) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in CASES[:2]:
        tensors = inputs(case, torch.float32)
        torch.testing.assert_close(compiled(*tensors), step(*tensors))


def test_on_cuda_it_is_traced_as_one_op():
    """Fake tensors: there is no GPU here."""
    with FakeTensorMode():
        query = torch.empty(64, 16, 128, device="cuda", dtype=torch.bfloat16)
        prompt, own = query.new_empty(8, 2, 700, 128), query.new_empty(64, 2, 256, 128)
        indices = [query.new_empty(n, dtype=torch.int32) for n in (9, 8, 1)]
        traced = make_fx(lambda *x: prefix_decode_op(*x, 8, 0.1))(query, prompt, prompt, own, own, *indices)
        y = prefix_decode_op(query, prompt, prompt, own, own, *indices, 8, 0.1)
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == ["vesalius.prefix_decode.default"]
    assert y.shape == (64, 16, 128) and y.is_cuda and y.dtype == torch.bfloat16


def test_wrong_shapes_are_named():
    query, prompt, _, own, _, bounds, start, position = inputs(CASES[0], torch.float32)
    with pytest.raises(
        ValueError, match=r"new_query, prompt_key and prompt_value must be .* not \[7, 8, 1, 64\], \[3, 3, 130, 64\]"
    ):
        prefix_decode(query, torch.randn(3, 3, 130, 64), torch.randn(3, 3, 130, 64), own, own, bounds, start, position)
    with pytest.raises(ValueError, match=r"own_key and own_value must be \[7, 2, R, 64\], not \[6, 2, 12, 64\]"):
        prefix_decode(query, prompt, prompt, own[:6], own[:6], bounds, start, position)
    with pytest.raises(ValueError, match=r"bounds, start and position must be \[4\], \[3\] and \[1\], not \[3\], \[3\], \[1\]"):
        prefix_decode(query, prompt, prompt, own, own, bounds[1:], start, position)
