"""The bench of rollouts runs, compares before it times, and says what its documents promise."""

import json

import pytest
import torch

from bench import rollout as bench


def test_a_small_rollout_is_measured(capsys):
    result = bench.main(["--prompts", "1", "--answers", "2", "--tokens", "3", "--repetitions", "1", "--lengths", "250"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["speedup_250"] > 0 and "speedup_700" not in result
    theirs, ours = result["rows"]
    assert (theirs["provider"], ours["provider"]) == ("generate", "vesalius")
    assert all(0 < row["tokens"] <= 6 and row["prompt_tokens"] == 250 for row in result["rows"])


@pytest.fixture(scope="module")
def policy():
    return bench.build_policy()


def test_both_sample_from_the_same_model_and_a_difference_ends_the_bench(policy, monkeypatch):
    batch, size = bench.prompts_of(policy, 1, 250, 392), bench.Size(1, 1, 4)
    assert batch.input_ids.shape == (1, 250) and int((batch.input_ids == policy.base.config.image_token_id).sum()) == 196
    monkeypatch.setattr(bench, "ours", lambda *_, **__: torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(SystemExit, match="the greedy answers of the two differ"):
        bench.measure(policy, batch, size, 1)


def test_tokens_are_counted_up_to_and_with_the_end(policy):
    end = policy.eos_token_ids[0]
    assert bench.answer_tokens(policy, torch.tensor([[5, 6, end, end], [5, 6, 7, 8], [end, 1, 1, 1]])) == 3 + 4 + 1
