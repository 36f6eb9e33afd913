"""The shared-prefix forward and the decoder equal Hugging Face's own forward and generate, for both families and ragged prompts."""

import copy
import json

import pytest
import torch

from engine.rollout.answers import GreedyAnswers
from engine.rollout.rollout import rollout
from engine.rollout.sampling import SamplingParams
from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import encode, noise_image, ragged_prompts, save_tiny

FAMILIES = ["qwen2_vl", "qwen2_5_vl"]


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, tmp_path_factory):
    return load_qwen_vl(save_tiny(tmp_path_factory.mktemp("model"), request.param))


def naive_logprobs(model, batch, answers):
    """Log-probs (B, G, T) by Hugging Face's forward, one row [prompt, answer] at a time and without padding."""
    rows = []
    for b in range(len(batch)):
        one = batch.select([b])
        for g in range(answers.shape[1]):
            ids = torch.cat([one.input_ids, answers[b, g][None]], 1)
            out = model(
                input_ids=ids,
                pixel_values=torch.cat(one.pixel_values),
                image_grid_thw=torch.stack(one.image_grid_thw),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
            )
            start = one.input_ids.shape[1]
            logprobs = out.logits[0, start - 1 : -1].log_softmax(-1)
            rows.append(logprobs.gather(-1, answers[b, g][:, None]).squeeze(-1))
    return torch.stack(rows).view(answers.shape)


def score_answers(answers):
    """A head that returns the log-probs (N, T) of `answers` (B, G, T)."""
    return lambda hidden, weight: (hidden @ weight.T).log_softmax(-1).gather(-1, answers.flatten(0, 1)[..., None]).squeeze(-1)


def shared_logprobs(policy, batch, answers):
    return policy.model(**policy.answer_inputs(batch, answers), head=score_answers(answers)).view(answers.shape)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prefix_equals_the_naive_forward_and_its_gradients(policy, checkpointing):
    policy.model.train()
    batch = encode(policy, *ragged_prompts(3))
    answers = torch.randint(10, 300, (3, 4, 7), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(answers.shape, generator=torch.Generator().manual_seed(2))

    naive = naive_logprobs(policy.base, batch, answers)
    (naive * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in policy.base.named_parameters()}
    policy.model.zero_grad()

    if checkpointing:
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shared = shared_logprobs(policy, batch, answers)
    (shared * weights).sum().backward()
    policy.model.gradient_checkpointing_disable()

    torch.testing.assert_close(shared, naive, atol=1e-5, rtol=1e-5)
    assert any("visual" in name and grad.abs().max() > 1e-3 for name, grad in expected.items())
    for name, parameter in policy.base.named_parameters():
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(parameter.grad / scale, expected[name] / scale, atol=1e-5, rtol=1e-5, msg=name)
    policy.model.zero_grad()


def test_an_image_token_in_an_answer_is_only_text(policy):
    batch = encode(policy, *ragged_prompts(2))
    answers = torch.full((2, 2, 3), policy.base.config.image_token_id)
    assert torch.isfinite(shared_logprobs(policy, batch, answers)).all()


def test_greedy_equals_generate_token_for_token(policy):
    policy.model.eval()
    batch = encode(policy, *ragged_prompts(4))
    answers = rollout(policy, batch, SamplingParams(temperature=0), num_generations=1, max_new_tokens=24)
    expected = policy.base.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=torch.cat(batch.pixel_values),
        image_grid_thw=torch.stack(batch.image_grid_thw),
        mm_token_type_ids=(batch.input_ids == policy.base.config.image_token_id).int(),
        max_new_tokens=24,
        do_sample=False,
    )[:, batch.input_ids.shape[1] :]
    assert answers.completion_ids.tolist() == expected.tolist()
    assert expected.unique().numel() > 8  # a degenerate model would agree with anything


def test_rollout_logprobs_are_those_of_the_training_forward(policy):
    policy.model.eval()
    batch = encode(policy, *ragged_prompts(3))
    answers = rollout(policy, batch, SamplingParams(), num_generations=4, max_new_tokens=12)
    ids = answers.completion_ids.view(3, 4, -1)
    with torch.no_grad():
        scored = shared_logprobs(policy, batch, ids).flatten(0, 1) * answers.completion_mask
    torch.testing.assert_close(answers.logprobs, scored, atol=1e-5, rtol=1e-5)


def test_samples_do_not_depend_on_the_batch(policy):
    """A prompt's answers are its own: the same alone, in a batch, and in another order."""
    policy.model.eval()
    batch = encode(policy, *ragged_prompts(3))
    together = rollout(policy, batch, SamplingParams(temperature=1.5), num_generations=4, max_new_tokens=10, seeds=[5, 6, 7])
    for b in range(3):
        alone = rollout(
            policy, batch.select([b]), SamplingParams(temperature=1.5), num_generations=4, max_new_tokens=10, seeds=[5 + b]
        )
        for g in range(4):
            row, length = b * 4 + g, int(alone.completion_mask[g].sum())
            assert together.completion_ids[row, :length].tolist() == alone.completion_ids[g, :length].tolist()
            assert int(together.completion_mask[row].sum()) == length


def test_features_of_a_frozen_tower_are_computed_once(policy):
    prompts, images = ragged_prompts(2)
    batch = encode(policy, prompts, images, ["a", "b"])
    assert policy.embed_images(batch).requires_grad and not policy.features
    frozen = policy.reference()
    first = frozen.embed_images(batch)
    assert len(frozen.features) == 2
    frozen.base.model.visual.forward = None  # a second pass would fail
    torch.testing.assert_close(
        frozen.embed_images(batch.select([1, 0])), torch.cat([first.split([6, 4])[1], first.split([6, 4])[0]])
    )


def test_the_reference_is_a_copy_that_does_not_move(policy):
    reference = policy.reference()
    batch = encode(policy, *ragged_prompts(2))
    answers = torch.randint(10, 300, (2, 2, 5), generator=torch.Generator().manual_seed(3))
    before = shared_logprobs(reference, batch, answers)
    saved = copy.deepcopy(policy.base.state_dict())
    with torch.no_grad():
        for parameter in policy.base.parameters():
            parameter.add_(0.1)
    assert torch.equal(shared_logprobs(reference, batch, answers), before)
    assert not torch.allclose(shared_logprobs(policy, batch, answers), before)
    policy.base.load_state_dict(saved)


def test_lora_trains_and_its_reference_is_the_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    from models.qwen.policy import QwenVLPolicy

    plain = load_qwen_vl(save_tiny(tmp_path))
    batch = encode(plain, *ragged_prompts(2))
    answers = torch.randint(10, 300, (2, 2, 5), generator=torch.Generator().manual_seed(3))
    base = shared_logprobs(plain, batch, answers).detach()
    targets = r".*language_model.*\.(q_proj|v_proj)"
    lora = QwenVLPolicy(get_peft_model(plain.model, LoraConfig(r=4, target_modules=targets)), plain.processor)
    reference = lora.reference()
    with torch.no_grad():
        for name, parameter in lora.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
    adapted = shared_logprobs(lora, batch, answers)
    assert not torch.allclose(adapted, base)
    with torch.no_grad(), reference.as_reference():
        torch.testing.assert_close(shared_logprobs(reference, batch, answers), base)
    adapted.sum().backward()
    assert {name.split(".")[-3] for name, p in lora.model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert lora.embed_images(encode(lora, *ragged_prompts(1), ["x"])) is not None and len(lora.features) == 1  # the tower is frozen


def test_selected_prompts_lose_their_padding(policy):
    batch = encode(policy, *ragged_prompts(3))
    shortest = int(batch.attention_mask.sum(1).argmin())
    one = batch.select([shortest])
    assert one.attention_mask.all() and one.input_ids.shape[1] == int(batch.attention_mask[shortest].sum())


def test_saved_checkpoint_opens_with_transformers_alone(policy, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    policy.model.save_pretrained(tmp_path)
    policy.processor.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    qwens = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json vocab.json merges.txt"
    assert set(qwens.split()) | {"preprocessor_config.json", "chat_template.json"} <= names
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    tokenizer, image_processor = AutoTokenizer.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    assert type(model) is type(policy.base) and json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]
    assert torch.equal(model.lm_head.weight, policy.base.lm_head.weight)
    assert tokenizer("What imaging").input_ids == policy.processor.tokenizer("What imaging").input_ids and tokenizer.chat_template
    pixels = image_processor(images=[noise_image(0)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, encode(policy, *ragged_prompts(1)).pixel_values[0], atol=0.02, rtol=0)


def test_greedy_answers_keep_the_order(policy):
    rows = [{"prompt": prompt, "images": images} for prompt, images in zip(*ragged_prompts(4), strict=True)]
    answers = GreedyAnswers(policy, lambda row: row["prompt"], max_new_tokens=8)
    assert answers(rows) == [answers([row])[0] for row in rows]


def test_a_text_only_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ValueError, match=r"text-only checkpoint \(model_type 'qwen2'\)"):
        load_qwen_vl(str(tmp_path))
