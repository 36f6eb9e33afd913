"""Supervised fine-tuning: its loss is Hugging Face's, the same however a step is divided, and what it teaches is said."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from engine.errors import InputError
from engine.training.config.sft import SFTConfig
from engine.training.sft import answer_likelihood
from kernels.linear_logprob import SKIP
from models.loading import load_policy
from tests.engine.training.grpo_run import checksum
from tests.engine.training.sft_run import ANSWERS, make_trainer, rows
from tests.engine.training.test_recovery import finish, start
from tests.tiny_qwen import noise_image, save_tiny

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}  # weights tell the gradient


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def micro_batch(trainer) -> list[dict]:
    """Four rows with answers of different lengths, questions of different lengths and images of different sizes."""
    for i, row in enumerate(trainer.train_dataset.rows[:4]):
        row["images"] = [noise_image(i, 28 * (i % 3 + 1), 56)]
    return [trainer.train_dataset[i] for i in range(4)]


def hugging_faces_loss(path: str, policy, micro: list[dict]):
    """(loss, gradients) of the model as Hugging Face loads it, by `labels`: whole rows, left-padded, prompts not counted."""
    prompts, answers = policy.batch([row["encoded"] for row in micro]), [row["answer_ids"] for row in micro]
    real = [ids[mask.bool()] for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True)]
    whole = [torch.cat([prompt, torch.tensor(answer)]) for prompt, answer in zip(real, answers, strict=True)]
    length = max(len(ids) for ids in whole)
    pad = policy.pad_token_id
    ids = torch.stack([torch.nn.functional.pad(ids, (length - len(ids), 0), value=pad) for ids in whole])
    labels = torch.full_like(ids, -100)
    for row, answer in zip(labels, answers, strict=True):
        row[-len(answer) :] = torch.tensor(answer)
    mask = torch.stack([torch.arange(length) >= length - len(ids) for ids in whole]).long()
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").train()
    loss = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.cat(prompts.pixel_values),
        image_grid_thw=torch.stack(prompts.image_grid_thw),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        labels=labels,
    ).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_loss_and_gradients_are_hugging_faces(tmp_path, family, checkpointing):
    path = save_tiny(tmp_path / "model", family)
    trainer = make_trainer(path, tmp_path)
    micro = micro_batch(trainer)
    assert len({len(row["answer_ids"]) for row in micro}) == 4
    expected, gradients = hugging_faces_loss(path, trainer.policy, micro)
    trainer.model.train()
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    loss = trainer.compute_loss(trainer.model, micro)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for name, parameter in trainer.model.named_parameters():
        scale = max(1e-2, gradients[name].abs().max().item())
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, atol=2e-5, rtol=0, msg=name)


def test_counts_are_those_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 8, generator=generator), torch.randn(50, 8, generator=generator)
    logits = hidden @ weight.T
    targets = torch.where(torch.rand(64, generator=generator) < 0.5, logits.argmax(1), torch.arange(64) % 50)
    targets[::5] = SKIP
    kept = targets != SKIP
    total, counts = answer_likelihood(hidden, weight, targets)
    logprobs = logits.log_softmax(1)[kept]
    entropy = -(logprobs.exp() * logprobs).sum(1)
    chosen = (logits.argmax(1) == targets)[kept].sum()
    assert 10 < chosen < kept.sum() - 10
    torch.testing.assert_close(total, logprobs.gather(1, targets[kept, None]).sum())
    torch.testing.assert_close(counts, torch.stack([kept.sum(), chosen, entropy.sum()]))


def test_a_step_is_the_same_however_it_is_divided(model, tmp_path):
    """Twice four rows in one, two or four micro-batches, whose answers differ in length: the same losses and weights."""
    runs = {}
    for size in (4, 2, 1):
        trainer = make_trainer(
            model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=2, **PLAIN
        )
        trainer.train()
        runs[size] = trainer
    whole = runs.pop(4)
    losses = [row["loss"] for row in whole.state.log_history[:-1]]
    for trainer in runs.values():
        assert [row["loss"] for row in trainer.state.log_history[:-1]] == pytest.approx(losses, rel=1e-4)
        for one, other in zip(whole.model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert checksum(whole.model) != checksum(load_policy(model).model)


def test_two_processes_equal_one_with_twice_the_batch(model, tmp_path):
    settings = {"max_steps": 2, "gradient_accumulation_steps": 1, **PLAIN, "learning_rate": 1e-2}
    two = {"model": model, "output_dir": str(tmp_path / "two"), "gradient_checkpointing": True, **settings}
    two = finish(start(two, processes=2, module="tests.engine.training.sft_run"))
    one = make_trainer(model, tmp_path / "one", **settings | {"per_device_train_batch_size": 4})
    one.train()
    assert two["losses"] == pytest.approx([row["loss"] for row in one.state.log_history[:-1]], rel=1e-4)
    assert two["checksum"] == pytest.approx(checksum(one.model), rel=1e-6)


@pytest.mark.parametrize("lora", [None, LORA])
def test_resume_is_bit_exact(model, tmp_path, lora):
    """Stopped after step 4 of 7, in the second epoch, and resumed: the same weights to the last bit, dropout included."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4}

    def trainer(name):
        return make_trainer(model, tmp_path / name, policy=load_policy(model, lora=lora, freeze_vision=bool(lora)), **settings)

    torch.manual_seed(0)  # for the adapters
    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 7
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    counts = [[row["answer_tokens"] for row in t.state.log_history[:-1]] for t in (whole, resumed)]
    assert counts[0] == counts[1] and len(counts[0]) == 7


@pytest.mark.parametrize("bf16", [False, True])
def test_lora_trains_adapters_only_also_with_checkpointing(model, tmp_path, bf16):
    policy = load_policy(model, lora=LORA)
    base = {name: p.detach().clone() for name, p in policy.model.named_parameters() if "lora" not in name}
    trainer = make_trainer(model, tmp_path, policy=policy, gradient_checkpointing=True, bf16=bf16)
    trainer.train()
    parameters = dict(policy.model.named_parameters())
    assert all(torch.equal(parameters[name], p) for name, p in base.items())
    assert all(p.abs().max() > 0 for name, p in parameters.items() if "lora_B" in name)
    assert len(policy.features) == 12  # a frozen tower sees an image once


def test_a_frozen_tower_stays_and_the_rest_learns(model, tmp_path):
    before = load_policy(model)
    trainer = make_trainer(model, tmp_path, policy=load_policy(model, freeze_vision=True))
    trainer.train()
    assert checksum(trainer.policy.base.model.visual) == checksum(before.base.model.visual)
    assert checksum(trainer.policy.base.lm_head) != checksum(before.base.lm_head)


def test_it_says_what_it_was_taught_and_stops(model, tmp_path):
    trainer = make_trainer(model, tmp_path, max_steps=60, learning_rate=5e-3)
    trainer.train()
    asked = rows()
    assert [answer.text for answer in trainer.answer(asked)] == [row["text"] for row in asked]
    logged = trainer.state.log_history[-2]
    assert logged["mean_token_accuracy"] == 1 and logged["loss"] < 0.05 and logged["entropy"] < 0.2
    per_epoch = sum(len(ids) for ids in trainer.policy.processor.answer_ids(ANSWERS)) * 3
    assert logged["answer_tokens"] == 20 * per_epoch


def test_the_training_set_must_fill_one_step(model, tmp_path):
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=16)
    with pytest.raises(InputError, match="the training set has 12 rows; one optimizer step needs 32 prompts"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_strategy": "steps", "eval_steps": 5}, "--eval_strategy is not supported"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor is not supported"),
        ({"fsdp": "full_shard"}, "--fsdp is not supported"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        SFTConfig(output_dir=str(tmp_path), **settings)
