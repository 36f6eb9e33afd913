"""Answers come through one protocol: in parts as at once, and from another sampler than the engine's own."""

import pytest
import torch

from engine.rollout.sampler import LocalSampler
from engine.rollout.sampling import SamplingParams
from models.qwen.policy import load_qwen_vl
from tests.engine.training.grpo_run import TextTask, make_trainer, questions, variety
from tests.tiny_qwen import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_prompts_sampled_in_parts_have_the_answers_that_they_have_together(model):
    policy, task = load_qwen_vl(model), TextTask()
    encoded = [policy.processor.encode(task.prompt(row), row["images"]) for row in questions(5)]
    asked = {"params": SamplingParams(), "num_answers": 3, "max_new_tokens": 12, "seeds": [3, 1, 4, 1, 5]}
    together, parts = (LocalSampler(policy, size).sample(encoded, **asked) for size in (None, 2))
    assert together.texts(policy.processor) == parts.texts(policy.processor)
    length = min(together.completion_ids.shape[1], parts.completion_ids.shape[1])
    for name in ("completion_ids", "completion_mask", "logprobs"):
        one, other = getattr(together, name), getattr(parts, name)
        torch.testing.assert_close(one[:, :length], other[:, :length], atol=1e-4, rtol=0)
    assert torch.equal(together.truncated, parts.truncated)


def test_another_sampler_can_answer(model, tmp_path):
    class Noting(LocalSampler):
        asked = 0

        def sample(self, encoded, params, **options):
            Noting.asked += len(encoded)
            return super().sample(encoded, params, **options)

    policy = load_qwen_vl(model)
    trainer = make_trainer(model, tmp_path, policy=policy, reward_funcs=[variety], max_steps=2, sampler=Noting(policy))
    trainer.train()
    assert Noting.asked == 8
