"""Policies of several families are what the engine asks for, as mypy proves; what it asks for is enough to sample and to train."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from engine.rollout.rollout import rollout
from engine.rollout.sampling import SamplingParams
from tests.engine.training.grpo_run import make_trainer, questions
from tests.llava_policy import build_llava_policy
from tests.tiny_qwen import encode, ragged_prompts

ROOT = Path(__file__).resolve().parents[3]
FITS = """
from engine.rollout.policy import DecodingState, GroundingPolicy, Policy, Processor, PromptBatch
from models.llava.decoding import LlavaDecoding
from models.decoder.decoding import Decoding
from models.qwen.policy import QwenVLPolicy
from models.qwen.processor import QwenProcessor
from models.qwen.prompts import PromptBatch as QwenPrompts
from models.uni_medvlm.policy import UniMedPolicy
from models.uni_medvlm.processor import UniMedProcessor
from models.uni_medvlm.prompts import PromptBatch as UniMedPrompts
from tests.drawing_policy import DrawingPolicy, SizedPrompts
from tests.llava_policy import LlavaPolicy, LlavaProcessor, LlavaPrompts

def qwen(policy: QwenVLPolicy) -> Policy[QwenPrompts]: return policy
def qwen_processor(processor: QwenProcessor) -> Processor: return processor
def qwen_prompts(prompts: QwenPrompts) -> PromptBatch: return prompts
def qwen_decoding(decoding: Decoding) -> DecodingState: return decoding
def llava(policy: LlavaPolicy) -> Policy[LlavaPrompts]: return policy
def llava_processor(processor: LlavaProcessor) -> Processor: return processor
def llava_prompts(prompts: LlavaPrompts) -> PromptBatch: return prompts
def llava_decoding(decoding: LlavaDecoding) -> DecodingState: return decoding
def unimed(policy: UniMedPolicy) -> GroundingPolicy[UniMedPrompts]: return policy
def unimed_processor(processor: UniMedProcessor) -> Processor: return processor
def unimed_prompts(prompts: UniMedPrompts) -> PromptBatch: return prompts
def drawing(policy: DrawingPolicy) -> GroundingPolicy[SizedPrompts]: return policy
"""
LACKS = """
from torch import Tensor

from engine.rollout.policy import DecodingState, Policy
from models.qwen.policy import QwenVLPolicy
from models.qwen.prompts import PromptBatch as QwenPrompts

class Stuck:
    def step(self, token_ids: Tensor) -> Tensor: return token_ids

def no_select(decoding: Stuck) -> DecodingState: return decoding

class Other(QwenVLPolicy):
    batch: None = None  # type: ignore[assignment]

def no_batch(policy: Other) -> Policy[QwenPrompts]: return policy
"""


def errors_of(source: str, folder: Path, cache: Path) -> list[str]:
    """The errors that mypy finds in a file of this text, one a line."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    file = folder / "fits.py"
    file.write_text(source)
    found, trouble, _ = api.run(
        [str(file), "--check-untyped-defs", "--ignore-missing-imports", "--follow-imports=silent", "--no-error-summary"]
        + ["--hide-error-context", "--config-file=", f"--cache-dir={cache}"]
    )
    assert not trouble
    return [line for line in found.splitlines() if ": error: " in line]


@pytest.fixture
def errors(request, tmp_path, monkeypatch):
    """`errors(source)`: what mypy says about it. What it knows of torch and transformers is kept from one test run to the next."""
    monkeypatch.chdir(ROOT)  # from where it finds our packages
    return partial(errors_of, folder=tmp_path, cache=request.config.cache.mkdir("mypy"))


@pytest.mark.slow
def test_mypy_finds_every_policy_to_be_what_the_engine_asks_for(errors):
    assert errors(FITS) == []


@pytest.mark.slow
def test_mypy_names_what_a_policy_lacks(errors):
    found = errors(LACKS)
    assert len(found) == 2, found
    assert 'got "Stuck", expected "DecodingState"' in found[0] and 'got "Other", expected "Policy' in found[1]


@pytest.fixture(scope="module")
def llava():
    return build_llava_policy([row["problem"] for row in questions()])


def test_a_llavas_greedy_answers_are_those_of_generate(llava):
    batch = encode(llava, *ragged_prompts(4))
    answers = rollout(llava, batch, SamplingParams(temperature=0), num_generations=1, max_new_tokens=24)
    plain = LlavaForConditionalGeneration(llava.model.config).eval()
    plain.load_state_dict(llava.model.state_dict())
    expected = plain.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=torch.cat(batch.pixel_values),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=llava.eos_token_ids,
        pad_token_id=llava.pad_token_id,
    )[:, batch.input_ids.shape[1] :]
    assert answers.completion_ids.tolist() == expected.tolist()
    assert expected.unique().numel() > 8  # a degenerate model would agree with anything


def test_a_llavas_rollout_has_the_log_probs_of_its_training_forward(llava):
    """Answers end at different places, so rows are dropped on the way."""
    batch = encode(llava, *ragged_prompts(3))
    settings = {"num_generations": 8, "max_new_tokens": 12}
    open_ended = rollout(llava, batch, SamplingParams(), **settings)
    end = {"</s>": int(open_ended.completion_ids.mode(0).values[3])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava.processor, "ids", llava.processor.ids | end)
        answers = rollout(llava, batch, SamplingParams(), **settings)
    assert 0 < answers.truncated.sum() < 24
    ids = answers.completion_ids.view(3, 8, -1)

    def head(hidden, weight):
        logprobs = (hidden @ weight.T).log_softmax(-1)
        return logprobs.gather(-1, answers.completion_ids[..., None]).squeeze(-1)

    with torch.no_grad():
        scored = llava.model(**llava.answer_inputs(batch, ids), head=head) * answers.completion_mask
    torch.testing.assert_close(answers.logprobs, scored, atol=1e-5, rtol=1e-5)


def test_grpo_trains_a_llava(tmp_path):
    policy = build_llava_policy([row["problem"] for row in questions()])
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    trainer = make_trainer("", tmp_path, policy=policy, max_steps=2, beta=0.04)
    trainer.train()
    steps = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert len(steps) == 2 and all(math.isfinite(logs["loss"]) and logs["grad_norm"] > 0 for logs in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[1]["kl"] > 1e-6  # the reference did not move with the policy
    moved = {name for name, parameter in policy.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"model.language_model.embed_tokens.weight", "model.multi_modal_projector.linear_1.weight"} <= moved
