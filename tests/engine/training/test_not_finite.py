"""What is not finite stops a run in one line, before it is saved."""

import math

import pytest
import torch

from engine.errors import InputError
from engine.finite import FiniteWatch, first_not_finite
from engine.training.checkpoints import newest_checkpoint
from tests.engine.training import grpo_run, sft_run, test_masks
from tests.tiny_qwen import save_tiny

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def grpo(model, folder, **settings):
    return grpo_run.make_trainer(model, folder, **settings)


def sft(model, folder, **settings):
    return sft_run.make_trainer(model, folder, **settings)


def masks(model, folder, **settings):
    torch.manual_seed(0)
    return test_masks.make_trainer(folder, data=test_masks.rows() * 4, **settings)


TRAINERS = pytest.mark.parametrize("make_trainer", [grpo, sft, masks])


def poison(trainer, at: int, number: float, of: str) -> None:
    """In step `at` the loss, or with a loss that stays finite its gradient, is multiplied by `number`."""
    compute, calls = trainer.compute_loss, []

    def poisoned(model, inputs, **options):
        loss = compute(model, inputs, **options)
        calls.append(trainer.state.global_step)
        if trainer.state.global_step != at - 1:
            return loss
        if of == "loss":
            return loss * number
        weight = next(p for p in model.parameters() if p.requires_grad).flatten()[0]
        return loss + (weight - weight.detach()) * number

    trainer.compute_loss = poisoned


@TRAINERS
@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(model, tmp_path, make_trainer, logging_steps):
    trainer = make_trainer(model, tmp_path, logging_steps=logging_steps, **SAVING)
    poison(trainer, 3, math.nan, "loss")
    with pytest.raises(
        InputError, match=rf"^step 3: the loss is nan; the last good checkpoint is {tmp_path}/checkpoint-2; a lower"
    ):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2" and not (tmp_path / ".saving").exists()
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_so_does_a_gradient(model, tmp_path, max_grad_norm):
    trainer = sft(model, tmp_path, max_grad_norm=max_grad_norm, **SAVING)
    poison(trainer, 2, 1e30, "gradient")
    with pytest.raises(InputError, match="^step 2: the gradient's norm is (inf|nan); the last good checkpoint is .*checkpoint-1;"):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"


@pytest.mark.parametrize("settings", [{"logging_strategy": "no"}, {"logging_nan_inf_filter": True}])
def test_no_setting_hides_it(model, tmp_path, settings):
    trainer = sft(model, tmp_path, max_steps=2, **settings)
    poison(trainer, 2, math.nan, "loss")
    with pytest.raises(InputError, match="^step 2: the loss is nan; no checkpoint was saved;"):
        trainer.train()


def test_weights_that_a_step_has_broken_are_not_saved(model, tmp_path):
    trainer = sft(model, tmp_path, **SAVING)
    step = trainer.create_optimizer().step

    def breaking(*args, **options):
        step(*args, **options)
        with torch.no_grad():
            trainer.policy.base.lm_head.weight[3, 4] = math.inf

    trainer.optimizer.step = breaking
    with pytest.raises(InputError, match="^step 1: the weights are not finite: .*(embed_tokens|lm_head).weight; no checkpoint"):
        trainer.train()


def test_a_metric_that_is_not_finite_stops_the_run(model, tmp_path, monkeypatch):
    trainer = sft(model, tmp_path, max_steps=2)
    monkeypatch.setattr(trainer, "step_metrics", lambda: {"entropy": math.nan})
    with pytest.raises(InputError, match="^step 1: entropy is nan;"):
        trainer.train()


@TRAINERS
def test_a_learning_rate_too_high_is_one_line(model, tmp_path, make_trainer):
    trainer = make_trainer(model, tmp_path, learning_rate=1e30, max_grad_norm=0.0, **SAVING)
    with pytest.raises(InputError, match=r"^step [12]: .* (is|are) (nan|inf|not finite)"):
        trainer.train()


@pytest.mark.parametrize("make_trainer", [grpo_run.make_trainer, sft_run.make_trainer])
def test_weights_that_are_not_finite_are_not_trained(model, tmp_path, make_trainer):
    from models.loading import load_policy

    policy = load_policy(model)
    policy.base.model.visual.blocks[0].norm1.weight.data[0] = math.nan
    with pytest.raises(InputError, match="the model's weights are not finite: model.visual.blocks.0.norm1.weight"):
        make_trainer(model, tmp_path, policy=policy)


def test_the_first_of_many_is_named():
    watch = FiniteWatch()
    watch.note(1, "loss", torch.tensor(2.0, dtype=torch.bfloat16))
    watch.note(2, "norm", 3.0)
    watch.note(2, "norm", None)
    watch.check("advice")
    for step, value in ((3, 1.0), (4, -math.inf), (5, math.nan)):
        watch.note(step, "loss", torch.tensor(value))
    with pytest.raises(InputError, match="^step 4: the loss is -inf; advice$"):
        watch.check("advice")
    watch.check("advice")  # what was said once is not kept


def test_only_floating_numbers_can_be_other_than_finite():
    weights = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64), "c": torch.tensor([1.0, math.nan])}
    parameters = [(name, torch.nn.Parameter(weight, requires_grad=False)) for name, weight in weights.items()]
    assert first_not_finite(parameters[:2]) is None and first_not_finite(parameters) == "c" and first_not_finite([]) is None
