"""Sampling as one op: truncation is transformers', a draw is where its uniform number lies in the float64 distribution.

TRITON_INTERPRET=1 pytest -m triton tests/kernels/test_sample.py
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import generation

from kernels import sample as module
from kernels.sample import cumulative_sum, penalise_repetition, sample, sample_op, sample_reference, truncate

WHOLE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
ASKED = [
    {},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "repetition_penalty": 1.3},
    {"top_k": 5},
    {"top_k": 5000},
    {"top_p": 0.8, "temperature": 1.5},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.9, "repetition_penalty": 0.7},
]


def logits_of(rows=5, vocabulary=37, seed=0):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def drawn_from(logits, seen, asked):
    """The float64 distribution that is drawn from: log-probs (N, V), -inf where cut off."""
    asked = WHOLE | asked
    logits = logits.double()
    logits = penalise_repetition(logits, seen, asked["repetition_penalty"]) if seen is not None else logits
    return truncate(logits / asked["temperature"], asked["top_k"], asked["top_p"], asked["min_p"]).log_softmax(-1)


def assert_drawn_exactly(logits, uniform, seen, asked, ours=None):
    """Each token can be drawn, has its uniform number between the sums before and after it, and its own log-prob."""
    ids, logprobs = sample(logits, uniform, seen, **asked) if ours is None else ours
    if asked.get("temperature") == 0:
        exact = sample_reference(logits.double(), uniform, seen, **asked)
        assert torch.equal(ids, exact[0])
        torch.testing.assert_close(logprobs.double(), exact[1], atol=2e-6, rtol=1e-6)
        return
    exact = drawn_from(logits, seen, asked)
    chosen = exact.gather(1, ids[:, None])[:, 0]
    assert chosen.isfinite().all()
    torch.testing.assert_close(logprobs.double(), chosen, atol=2e-6, rtol=1e-6)
    after = exact.exp().cumsum(-1).gather(1, ids[:, None])[:, 0]
    before = after - chosen.exp()
    assert (before <= uniform.double() + 2e-6).all() and (uniform.double() <= after + 2e-6).all()


def case(rows, vocabulary, seed=0):
    """Logits, uniform numbers with both ends of their interval, and which tokens were seen."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])[:rows]
    return logits_of(rows, vocabulary, seed), uniform, torch.rand(rows, vocabulary, generator=generator) < 0.2


@pytest.mark.parametrize("vocabulary", [1, 2, 37, 3000])
@pytest.mark.parametrize("asked", ASKED)
def test_against_float64(asked, vocabulary, poisoned_memory):
    logits, uniform, seen = case(40, vocabulary)
    assert_drawn_exactly(logits, uniform, seen if "repetition_penalty" in asked else None, asked)


@pytest.mark.triton
@pytest.mark.parametrize(("asked", "vocabulary"), [*((asked, 300) for asked in ASKED), ({}, 1), (ASKED[-1], 1), (ASKED[-1], 37)])
def test_the_triton_bodies_against_float64(asked, vocabulary, monkeypatch, poisoned_memory):
    """300 columns are three tiles and two blocks, the last ones ragged."""
    monkeypatch.setattr(module, "TILE", 128)
    monkeypatch.setattr(module, "BLOCK", 256)
    logits, uniform, seen = case(3, vocabulary)
    assert_drawn_exactly(logits, uniform, seen if "repetition_penalty" in asked else None, asked)


TIES = [
    ({"top_k": 3}, {0, 1, 2, 4, 6, 7}),
    ({"top_p": 0.75}, {1, 4, 6, 7}),  # of 9.80 in all 2.45 may go: 0.37 and two ones
    ({"top_k": 3, "top_p": 0.75}, {1, 4, 6, 7}),
    ({"top_k": 2}, {1, 7}),
    ({"top_p": 0.25}, {7}),
    ({"min_p": 0.2}, {0, 1, 2, 4, 6, 7}),
]


def assert_ties_are_cut_as_specified(cases):
    """Four of eight logits are alike: rank keeps them all, mass drops the first of them; both zeros are alike."""
    row = torch.tensor([0.0, 1.0, -0.0, -1.0, 0.0, -torch.inf, 0.0, 1.0])
    uniform = (torch.arange(10) + 0.5) / 10
    rows = row.expand(10, -1)
    for asked, kept in cases:
        ids, logprobs = sample(rows, uniform, **asked)
        assert set(ids.tolist()) == kept, asked
        mass = row[sorted(kept)].logsumexp(0)
        torch.testing.assert_close(logprobs, row[ids] - mass)
    assert sample(rows[:1], uniform[:1], temperature=0.0)[0].tolist() == [1]


def test_ties_are_cut_as_specified():
    assert_ties_are_cut_as_specified(TIES)


@pytest.mark.triton
def test_ties_are_cut_as_specified_by_the_triton_bodies(monkeypatch, poisoned_memory):
    """Ties lie in both blocks."""
    monkeypatch.setattr(module, "TILE", 4)
    monkeypatch.setattr(module, "BLOCK", 4)
    assert_ties_are_cut_as_specified(TIES[:3])


def assert_the_only_token_is_drawn():
    row = torch.full((1, 300), -torch.inf)
    row[0, 171] = -5.0
    for uniform, asked in itertools.product(
        (0.0, 1 - 2**-24), ({}, {"top_k": 3, "top_p": 0.5}, {"min_p": 0.5, "temperature": 0.3})
    ):
        ids, logprobs = sample(row, torch.tensor([uniform]), **asked)
        assert (ids.tolist(), logprobs.tolist()) == ([171], [0.0])


def test_the_only_token_is_drawn():
    assert_the_only_token_is_drawn()


@pytest.mark.triton
def test_the_only_token_is_drawn_by_the_triton_bodies(monkeypatch, poisoned_memory):
    monkeypatch.setattr(module, "TILE", 128)
    assert_the_only_token_is_drawn()


@pytest.mark.triton
def test_logits_that_are_no_numbers_have_a_log_prob_that_is_none(monkeypatch, poisoned_memory):
    """The token is one of the vocabulary all the same: it is looked up before anyone can look at the log-prob."""
    monkeypatch.setattr(module, "TILE", 16)
    rows = logits_of(2, 37)
    rows[0, 20], rows[1] = torch.nan, -torch.inf
    for asked in ({}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.9}):
        ids, logprobs = sample(rows, torch.tensor([0.9, 0.9]), **asked)
        assert ((ids >= 0) & (ids < 37)).all() and logprobs.isnan().all()


@pytest.mark.parametrize(
    ("asked", "processors"),
    [
        ({"top_k": 5}, [generation.TopKLogitsWarper(5)]),
        ({"top_k": 500}, []),
        ({"top_p": 0.8}, [generation.TopPLogitsWarper(0.8)]),
        ({"top_p": 1e-6}, [generation.TopPLogitsWarper(1e-6)]),
        ({"min_p": 0.2}, [generation.MinPLogitsWarper(0.2)]),
        (
            {"top_k": 9, "top_p": 0.9, "min_p": 0.05},
            [generation.TopKLogitsWarper(9), generation.TopPLogitsWarper(0.9), generation.MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_truncation_is_transformers(asked, processors):
    expected = logits_of()
    for processor in processors:
        expected = processor(None, expected)
    assert torch.equal(truncate(logits_of(), **asked), expected)


def test_repetition_penalty_is_transformers():
    ids = torch.tensor([[1, 2, 2, 9], [0, 5, 6, 7]])
    seen = torch.zeros(2, 37, dtype=torch.bool).scatter_(1, ids, True)
    expected = generation.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits_of(2))
    torch.testing.assert_close(penalise_repetition(logits_of(2), seen, 1.3), expected)


def test_draws_follow_the_distribution():
    row = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    ids, logprobs = sample(row.expand(10_000, -1), uniform, temperature=0.5)
    expected = (row[0] / 0.5).softmax(0)
    torch.testing.assert_close(ids.bincount(minlength=4) / 10_000, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[ids])


def test_the_ends_of_the_unit_interval_give_possible_tokens():
    row = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    ids, _ = sample(row, torch.tensor([0.0, 1 - 2**-24]))
    assert ids.tolist() == [1, 3]


def test_half_types_are_computed_in_float32():
    logits, uniform, _ = case(40, 3000)
    ids, logprobs = sample(logits.bfloat16(), uniform, top_p=0.9)
    assert_drawn_exactly(logits.bfloat16().float(), uniform, None, {"top_p": 0.9}, (ids, logprobs))


class AsOnCuda(torch.Tensor):
    """A tensor that says to be on a GPU, and refuses there what torch refuses where determinism is asked for."""

    is_cuda = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.cumsum, torch.Tensor.cumsum) and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("asked", [{}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}])
def test_full_determinism_samples_the_same_tokens(asked):
    """On a GPU without Triton."""
    many, uniform = logits_of(400, 1000), torch.rand(400, generator=torch.Generator().manual_seed(1))
    expected = sample_reference(many, uniform, **asked)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            many.as_subclass(AsOnCuda).cumsum(-1)
        ids, logprobs = sample_reference(many.as_subclass(AsOnCuda), uniform, **asked)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(logprobs.as_subclass(torch.Tensor), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 64, 1000])
def test_sums_by_doubling_are_cumulative_sums(vocabulary):
    x = torch.rand(3, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        ours = cumulative_sum(x.as_subclass(AsOnCuda))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(ours.as_subclass(torch.Tensor).float(), x.cumsum(-1).float())


def test_opcheck_and_a_whole_graph():
    torch._dynamo.reset()
    logits, uniform, seen = case(4, 37)
    torch.library.opcheck(sample_op, (logits, uniform, seen, 0.9, 20, 0.9, 0.01, 1.2))
    torch.library.opcheck(sample_op, (logits, uniform, None, 0.0, 0, 1.0, 0.0, 1.0))
    asked = {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}

    def step(logits, uniform, seen):
        return sample(logits * 2, uniform, seen, **asked)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, vocabulary in ((4, 37), (7, 300)):
        tensors = case(rows, vocabulary)
        torch.testing.assert_close(compiled(*tensors), step(*tensors))


def test_on_cuda_two_launches_are_traced_and_a_third_where_tokens_are_cut_off(hopper):
    """Fake tensors: there is no GPU here."""

    def launches(*numbers):
        with FakeTensorMode():
            rows, uniform = torch.empty(64, 151936, device="cuda"), torch.empty(64, device="cuda")
            traced = dispatch_functionalize(lambda *x: sample_op._opoverload(*x, None, *numbers), FunctionalTensorMode())
            nodes = make_fx(traced)(rows, uniform).graph.nodes
        return [str(getattr(node.target, "__name__", "")) for node in nodes].count("triton_kernel_wrapper_functional")

    assert launches(1.0, 0, 1.0, 0.0, 1.0) == launches(0.0, 50, 0.9, 0.0, 1.0) == 2
    assert launches(0.7, 50, 0.9, 0.05, 1.0) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(37)}, r"logits must be \(N, V\)"),
        ({"uniform": torch.zeros(4)}, r"uniform must be \(5,\), not \(4,\)"),
        ({"seen": torch.zeros(5, 37)}, r"seen must be \(5, 37\) of bool"),
        ({"temperature": -0.1}, "temperature is out of range: -0.1"),
        ({"top_k": -1}, "top_k is out of range"),
        ({"top_p": 0.0}, "top_p is out of range"),
        ({"min_p": 1.5}, "min_p is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is out of range"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        sample(**({"logits": logits_of(), "uniform": torch.zeros(5)} | change))
