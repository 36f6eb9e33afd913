"""The settings of sampling reach the op that samples (tests/kernels/test_sample.py), and the rollout's bookkeeping is right."""

import pytest
import torch

from engine.rollout.rollout import _rows_to_keep, rollout
from engine.rollout.sampling import SamplingParams, choose
from kernels.sample import sample
from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import encode, ragged_prompts, save_tiny


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    policy = load_qwen_vl(save_tiny(tmp_path_factory.mktemp("model")))
    policy.model.eval()
    return policy


def logits(rows=5, vocabulary=37, seed=0):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_the_settings_reach_the_op():
    """Each changes what is drawn, and None of them is what the op takes for nothing."""
    seen, uniform = torch.rand(5, 37, generator=torch.Generator().manual_seed(2)) < 0.5, torch.full((5,), 0.9)
    plain = choose(logits(), SamplingParams(), uniform, seen)
    for name, value in (("temperature", 0.5), ("top_p", 0.7), ("top_k", 3), ("min_p", 0.2), ("repetition_penalty", 2.0)):
        ids, logprobs = choose(logits(), SamplingParams(**{name: value}), uniform, seen)
        expected = sample(logits(), uniform, seen, **{name: value})
        assert torch.equal(ids, expected[0]) and torch.equal(logprobs, expected[1]) and not torch.equal(logprobs, plain[1])


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
