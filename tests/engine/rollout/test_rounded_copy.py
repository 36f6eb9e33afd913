"""Answers of a rounded copy: those of the same weights loaded in bfloat16, also after the weights have changed; what is trained and
scored stays in float32."""

import pytest
import torch

from engine.errors import InputError
from engine.rollout.rollout import rollout
from engine.rollout.rounded_copy import RoundedCopy
from engine.rollout.sampler import LocalSampler
from engine.rollout.sampling import SamplingParams
from engine.training.config.grpo import GRPOConfig
from models.loading import load_policy
from tests.engine.training.grounding_run import DrawTask, build
from tests.engine.training.grounding_run import rows as grounding_rows
from tests.engine.training.grpo_run import checksum, make_trainer, variety
from tests.tiny_qwen import encode, ragged_prompts, save_tiny

LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def answers_of(policy, prompts):
    policy.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return rollout(policy, encode(policy, *prompts), SamplingParams(), num_generations=4, max_new_tokens=12)


def test_it_answers_as_the_weights_loaded_in_bfloat16_do(model):
    policy, half = load_policy(model), load_policy(model, dtype=torch.bfloat16)
    rounded, prompts = RoundedCopy(policy, torch.bfloat16), ragged_prompts(3)
    kept = []
    for _ in range(2):
        own, others = answers_of(rounded.policy, prompts), answers_of(half, prompts)
        assert torch.equal(own.completion_ids, others.completion_ids) and torch.equal(own.logprobs, others.logprobs)
        kept.append(own.completion_ids)
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std())
            half.model.load_state_dict({name: value.bfloat16() for name, value in policy.model.state_dict().items()})
        half.forget_images()
        rounded.refresh()
    assert not torch.equal(*kept)
    assert all(weight.dtype == torch.float32 for weight in policy.model.parameters())


def test_weights_in_bfloat16_are_shared_and_adapters_rounded(model):
    policy = load_policy(model, dtype=torch.bfloat16, lora=LORA)
    rounded = RoundedCopy(policy, torch.bfloat16)
    pairs = zip(policy.model.named_parameters(), rounded.policy.model.parameters(), strict=True)
    kinds = {("lora_" in name, own.data_ptr() == other.data_ptr(), other.dtype) for (name, own), other in pairs}
    assert kinds == {(False, True, torch.bfloat16), (True, False, torch.bfloat16)}
    assert rounded.policy.processor is policy.processor
    answers_of(rounded.policy, ragged_prompts(2))


def test_a_mixture_of_experts_that_draws_answers_too():
    """Its ledger and tower are its own."""
    policy, task = build("unimed"), DrawTask()
    rounded = RoundedCopy(policy, torch.bfloat16)
    data = grounding_rows(2)
    batch = [rounded.policy.processor.encode(task.prompt(row), row["images"], None) for row in data]
    with torch.autocast("cpu", torch.bfloat16):
        answers = rollout(rounded.policy, rounded.policy.batch(batch), SamplingParams(), num_generations=2, max_new_tokens=5)
    assert answers.logprobs.isfinite().all() and answers.completion_mask.any(1).all()


def test_training_samples_from_the_weights_of_each_step_and_scores_with_those_in_float32(model, tmp_path):
    seen = []

    def same(prompts, completions, **columns):
        """A reward that is asked after answers were sampled, before the weights move."""
        pairs = [*zip(policy.model.parameters(), trainer.rounded.policy.model.parameters(), strict=True)]
        seen.append((all(torch.equal(own.bfloat16(), other) for own, other in pairs), checksum(policy.model)))
        return variety(prompts, completions, **columns)

    policy = load_policy(model)
    rounding = {"bf16": True, "rollout_dtype": "bfloat16"}
    trainer = make_trainer(model, tmp_path, policy=policy, reward_funcs=[same], max_steps=3, **rounding)
    assert trainer.sampler.sampler.policy is trainer.rounded.policy
    trainer.train()
    exact, sums = zip(*seen, strict=True)
    assert exact == (True, True, True) and len(set(sums)) == 3
    assert all(weight.dtype == torch.float32 for weight in policy.model.parameters())
    logs = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-7) and logs[-1]["kl"] > 1e-6


def test_what_cannot_be_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="--rollout_dtype float16: expected bfloat16"):
        GRPOConfig(output_dir=str(tmp_path), bf16=True, rollout_dtype="float16")
    with pytest.raises(InputError, match="--rollout_dtype needs --bf16"):
        GRPOConfig(output_dir=str(tmp_path), rollout_dtype="bfloat16")
    policy = load_policy(model)
    with pytest.raises(InputError, match="--rollout_dtype is for answers that are sampled here"):
        make_trainer(model, tmp_path, policy=policy, sampler=LocalSampler(policy), bf16=True, rollout_dtype="bfloat16")
