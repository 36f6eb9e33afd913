"""The settings of sampling reach the op that samples (tests/kernels/test_sample.py), and the rollout's bookkeeping is right."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.rollout import rollout as module
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


class Reads(TorchDispatchMode):
    """How often the host asks for a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@dataclass
class Prompts:
    """One prompt of one token a row."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def __len__(self):
        return len(self.input_ids)


class Table:
    """A policy, and its decoding state, whose logits are those of (row of the rollout, place, newest token): a row is what it is,
    whatever is computed beside it."""

    device, eos_token_ids, pad_token_id, repetition_penalty = torch.device("cpu"), [3, 5], 0, 1.0

    def prefill(self, batch, num_answers, max_new_tokens):
        rows = len(batch) * num_answers
        self.logits = 2 * torch.randn(max_new_tokens, 11, rows, 11, generator=torch.Generator().manual_seed(4))
        self.left, self.place, self.rows_computed = torch.arange(rows), 0, []
        return self, self.logits[0, 0]

    def step(self, token_ids):
        self.place += 1
        self.rows_computed.append(len(token_ids))
        return self.logits[self.place, token_ids, self.left]

    def select(self, rows):
        self.left = self.left[rows]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.5)])
@pytest.mark.parametrize("max_new_tokens", [1, 7, 8, 30])
def test_answers_are_the_same_however_seldom_ends_are_read(params, max_new_tokens, monkeypatch):
    found, batch = [], Prompts(torch.tensor([[1], [2], [4]]), torch.ones(3, 1))
    for unread in (1, 8, 100):
        monkeypatch.setattr(module, "_tokens_unread", lambda device, unread=unread: unread)
        table = Table()
        with Reads() as reads:
            answers = rollout(table, batch, params, num_generations=8, max_new_tokens=max_new_tokens)
        found.append((answers, reads.count, table.rows_computed))
    (first, many, fewest_rows), *others = found
    for answers, few, rows in others:
        for name in ("completion_ids", "completion_mask", "logprobs", "truncated"):
            assert torch.equal(getattr(answers, name), getattr(first, name)), name
        assert few <= 1 + max_new_tokens // 8 and few <= many and sum(rows) >= sum(fewest_rows)
    assert many > 8 or max_new_tokens < 30
    assert first.truncated.any() == (max_new_tokens < 30)


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


def test_ends_are_read_at_every_token_on_a_cpu_alone():
    assert [module._tokens_unread(torch.device(kind)) for kind in ("cpu", "cuda")] == [1, 8]
