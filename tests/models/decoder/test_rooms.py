"""Decode steps that are replayed, with a capture that needs no GPU: its replay computes again what was captured, into the same
outputs. What it reads and writes is that of the capture, as with a CUDA graph."""

import contextlib

import pytest
import torch

from engine.rollout.rollout import rollout
from engine.rollout.sampling import SamplingParams
from models.decoder.decoding import ROOMS, Rooms
from models.loading import load_policy
from tests.models.sam.test_replay import Captures
from tests.tiny_qwen import encode, ragged_prompts, save_tiny


@pytest.fixture
def eager_and_replayed(tmp_path):
    """A policy as it is here, another that replays as on CUDA, and its captures; with the same weights."""
    path = save_tiny(tmp_path)
    eager, replayed, captures = load_policy(path), load_policy(path), Captures()
    replayed.rooms = Rooms(captures, devices=("cpu",))
    for policy in (eager, replayed):
        policy.model.eval()
        policy.base.generation_config.eos_token_id = [*range(10, 60)]  # of 512 or so: rows end all the time
    return eager, replayed, captures


def assert_same_answers(policies, prompts, max_new_tokens=12, answers=4, autocast=False):
    """Sampled with the same seeds from prompts of different lengths."""
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        eager, replayed = (
            rollout(policy, encode(policy, *prompts), SamplingParams(), num_generations=answers, max_new_tokens=max_new_tokens)
            for policy in policies
        )
    assert torch.equal(eager.completion_ids, replayed.completion_ids)
    torch.testing.assert_close(eager.logprobs, replayed.logprobs, atol=1e-5, rtol=1e-5)
    return eager


def test_a_later_rollout_replays_what_an_earlier_one_captured(eager_and_replayed):
    *policies, captures = eager_and_replayed
    texts, images = ragged_prompts(6)
    first = assert_same_answers(policies, (texts[:3], images[:3]))
    assert 0 < first.truncated.sum() < 12  # rows were dropped
    numbers, [room] = captures.captured, policies[1].rooms._rooms.values()
    assert numbers == len(room.graphs) > 1
    again = assert_same_answers(policies, (texts[:3], images[:3]))
    assert captures.captured == numbers and captures.replayed >= 2 * numbers
    other = assert_same_answers(policies, (texts[3:], images[3:]))  # others, of other lengths
    assert [*policies[1].rooms._rooms.values()] == [room] and captures.captured == len(room.graphs)
    assert torch.equal(first.completion_ids, again.completion_ids) and not torch.equal(other.completion_ids, first.completion_ids)


def test_weights_may_be_written_but_not_moved(eager_and_replayed):
    *policies, captures = eager_and_replayed
    prompts, answers = ragged_prompts(2), []

    def written(policy):
        policy.base.lm_head.weight.mul_(0.5)

    def moved(policy):
        policy.base.lm_head.weight.data = policy.base.lm_head.weight.data * 3

    answers.append(assert_same_answers(policies, prompts).completion_ids)
    for change, kept in ((written, True), (moved, False)):
        [room] = policies[1].rooms._rooms.values()
        with torch.no_grad():
            for policy in policies:
                change(policy)
        answers.append(assert_same_answers(policies, prompts).completion_ids)
        assert ([*policies[1].rooms._rooms.values()] == [room]) == kept
    assert captures.captured > 1 and not any(torch.equal(a, b) for a, b in zip(answers, answers[1:], strict=False))


def test_where_autocast_casts_a_room_is_for_one_rollout(eager_and_replayed, tmp_path):
    *policies, captures = eager_and_replayed
    assert_same_answers(policies, ragged_prompts(2), autocast=True)
    assert captures.captured and not policies[1].rooms._rooms
    half = load_policy(save_tiny(tmp_path), dtype=torch.bfloat16)
    half.model.eval()
    half.rooms = Rooms(Captures(), devices=("cpu",))
    with torch.autocast("cpu", torch.bfloat16):
        rollout(half, encode(half, *ragged_prompts(2)), SamplingParams(), num_generations=2, max_new_tokens=3)
    assert len(half.rooms._rooms) == 1  # it casts nothing


def test_the_room_of_longest_ago_goes_and_one_taken_over_says_so(eager_and_replayed):
    *policies, _ = eager_and_replayed
    prompts, replayed = ragged_prompts(2), policies[1]
    for answers in range(1, ROOMS + 3):
        assert_same_answers(policies, prompts, answers=answers, max_new_tokens=4)
    assert [len(room.position) for room in replayed.rooms._rooms.values()] == [2 * answers for answers in (3, 4)]
    with torch.no_grad():
        (first, logits), _ = (replayed.prefill(encode(replayed, *prompts), 4, 4) for _ in range(2))
    with pytest.raises(RuntimeError, match="a later rollout decodes in the memory of this one"):
        first.step(logits.argmax(-1))


def test_without_a_graph_the_reason_is_said_once_and_answers_are_the_same(eager_and_replayed, caplog):
    *policies, _ = eager_and_replayed

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    policies[1].rooms = Rooms(refuse, devices=("cpu",))
    for _ in range(2):
        assert_same_answers(policies, ragged_prompts(2), max_new_tokens=4)
    [record] = caplog.records
    assert record.message.endswith("launches its kernels: operation not permitted when stream is capturing")
