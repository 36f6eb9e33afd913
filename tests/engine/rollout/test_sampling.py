"""Truncation equals transformers' logits processors, draws follow the distribution, and the rollout's bookkeeping is right."""

import pytest
import torch
from transformers import generation

from engine.rollout.rollout import _rows_to_keep, rollout
from engine.rollout.sampling import SamplingParams, choose, cumulative_sum, penalise_repetition, truncate
from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import encode, ragged_prompts, save_tiny


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    policy = load_qwen_vl(save_tiny(tmp_path_factory.mktemp("model")))
    policy.model.eval()
    return policy


def logits(rows=5, vocabulary=37, seed=0):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        (SamplingParams(top_k=5), [generation.TopKLogitsWarper(5)]),
        (SamplingParams(top_k=500), []),
        (SamplingParams(top_p=0.8), [generation.TopPLogitsWarper(0.8)]),
        (SamplingParams(top_p=1e-6), [generation.TopPLogitsWarper(1e-6)]),
        (SamplingParams(min_p=0.2), [generation.MinPLogitsWarper(0.2)]),
        (
            SamplingParams(top_k=9, top_p=0.9, min_p=0.05),
            [generation.TopKLogitsWarper(9), generation.TopPLogitsWarper(0.9), generation.MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_truncation_is_transformers(params, processors):
    expected = logits()
    for processor in processors:
        expected = processor(None, expected)
    assert torch.equal(truncate(logits(), params), expected)


def test_repetition_penalty_is_transformers():
    ids = torch.tensor([[1, 2, 2, 9], [0, 5, 6, 7]])
    seen = torch.zeros(2, 37, dtype=torch.bool).scatter_(1, ids, True)
    expected = generation.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits(2))
    torch.testing.assert_close(penalise_repetition(logits(2), seen, 1.3), expected)


def test_draws_follow_the_distribution():
    row = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    ids, logprobs = choose(row.expand(10_000, -1), SamplingParams(temperature=0.5), uniform)
    expected = (row[0] / 0.5).softmax(0)
    torch.testing.assert_close(ids.bincount(minlength=4) / 10_000, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[ids])


def test_the_ends_of_the_unit_interval_give_possible_tokens():
    row = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    ids, _ = choose(row, SamplingParams(), torch.tensor([0.0, 1 - 2**-24]))
    assert ids.tolist() == [1, 3]


class AsOnCuda(torch.Tensor):
    """A tensor that says to be on a GPU, and refuses there what torch refuses where determinism is asked for."""

    is_cuda = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.cumsum, torch.Tensor.cumsum) and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=9, top_p=0.9, min_p=0.05)])
def test_full_determinism_samples_the_same_tokens(params):
    many, uniform = logits(400, 1000), torch.rand(400, generator=torch.Generator().manual_seed(1))
    expected = choose(many, params, uniform)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            many.as_subclass(AsOnCuda).cumsum(-1)
        ids, logprobs = choose(many.as_subclass(AsOnCuda), params, uniform)
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


def test_greedy_ignores_the_noise():
    ids, logprobs = choose(logits(), SamplingParams(temperature=0), torch.rand(5))
    torch.testing.assert_close(logprobs, logits().log_softmax(-1).max(-1).values)
    assert torch.equal(ids, logits().argmax(-1))


def test_answers_end_at_any_end_token(policy):
    """Two end tokens; what follows one is padding, and answers without one are truncated."""
    batch = encode(policy, *ragged_prompts(3))
    open_ended = rollout(policy, batch, SamplingParams(), num_generations=8, max_new_tokens=12)
    ends = {int(open_ended.completion_ids[0, 3]), int(open_ended.completion_ids[5, 6])}
    policy.base.generation_config.eos_token_id = sorted(ends)
    answers = rollout(policy, batch, SamplingParams(), num_generations=8, max_new_tokens=12)
    policy.base.generation_config.eos_token_id = policy.processor.tokenizer.eos_token_id
    assert 0 < answers.truncated.sum() < 24
    for row, full in enumerate(open_ended.completion_ids.tolist()):
        stop = next((i + 1 for i, token in enumerate(full) if token in ends), 12)
        length = int(answers.completion_mask[row].sum())
        assert length == stop and answers.completion_ids[row, :length].tolist() == full[:stop]
        assert (answers.completion_ids[row, length:] == policy.pad_token_id).all()
        assert (answers.logprobs[row, length:] == 0).all()
        assert bool(answers.truncated[row]) == (not ends & set(full))


def test_repetition_penalty_changes_rollouts(policy):
    batch = encode(policy, *ragged_prompts(2))
    settings = {"num_generations": 1, "max_new_tokens": 24}
    plain = rollout(policy, batch, SamplingParams(temperature=0), **settings)
    penalised = rollout(policy, batch, SamplingParams(temperature=0, repetition_penalty=5.0), **settings)
    assert len(set(penalised.completion_ids[0].tolist())) >= len(set(plain.completion_ids[0].tolist()))
    assert penalised.completion_ids.tolist() != plain.completion_ids.tolist()


def test_rows_are_dropped_once_it_pays():
    assert [_rows_to_keep(16, n, static=False) for n in (16, 15, 14, 1)] == [16, 16, 14, 1]
    assert [_rows_to_keep(16, n, static=True) for n in (16, 9, 8, 3, 1)] == [16, 16, 8, 4, 1]
    assert _rows_to_keep(12, 1, static=True) == 3
