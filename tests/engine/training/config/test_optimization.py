"""Optimizer and learning rate are tried before anything is loaded: what fails or does nothing is one line."""

import json
import math

import pytest
import torch

from engine.errors import InputError
from engine.training.config import optimization
from engine.training.config.grpo import GRPOConfig
from engine.training.config.masks import MaskConfig
from engine.training.config.sft import SFTConfig
from recipes.medr1_sft import main as medr1_sft
from recipes.prs_med_train import main as prs_med_train
from tests.engine.training.test_masks import make_trainer

RATE = {"learning_rate": 1e-3, "max_steps": 10, "warmup_steps": 0}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"optim_args": "momentum=0.9"}, "--optim_args momentum=0.9: --optim adamw_torch_fused does not read momentum"),
        ({"optim": "adafactor", "optim_args": "decay_rate=-0.8"}, "--optim adafactor does not read decay_rate"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,momentun=0.9"}, "--optim sgd does not read momentun"),
        ({"optim": "sgd", "optim_args": "momentum=high"}, "momentum=high: could not convert string to float: 'high'"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "--optim_args momentum=-1: Invalid momentum value: -1.0"),
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "momentum is nan: expected a finite number"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "Nesterov momentum requires a momentum"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=maybe"}, "nesterov is maybe: expected true or false"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,momentum=0.1"}, "momentum is there twice"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "weight_decay is not read there: use --weight_decay"),
        ({"optim": "lion_8bit"}, "--optim lion_8bit: You need to install `bitsandbytes`"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q"]}, "--optim galore_adamw: You need to install `galore_torch`"),
    ],
)
def test_an_optimizer_that_cannot_be_made_or_does_not_read_its_settings_is_one_line(tmp_path, settings, line):
    with pytest.raises(InputError) as error:
        GRPOConfig(output_dir=str(tmp_path), **(RATE | settings))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("config", [GRPOConfig, SFTConfig, MaskConfig])
def test_a_schedule_that_waits_for_evaluations_is_refused(tmp_path, config, kind):
    with pytest.raises(InputError, match=f"--lr_scheduler_type {kind} is not supported: .* training evaluates nothing"):
        config(output_dir=str(tmp_path), lr_scheduler_type=kind, lr_scheduler_kwargs={"factor": 0.5})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "no learning rate can be made of it (One of min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "low"}}, "unsupported operand type"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1}},
            "of step 2 would be 0.0254473: expected",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": -1e999}}, "is -inf: expected finite"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}}, "lr_end (1) must be smaller than initial lr"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1}}, "of step 2 would be -0.0991: expected 0 to"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}, "no learning rate can be made of it ("),
        (
            {"lr_scheduler_type": "polynomial", "warmup_steps": 10},
            "polynomial, --warmup_steps 10: no learning rate can be made of it",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 400}, "max_steps": 1, "warmup_steps": 1},
            "made of it",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
            "no learning rate can be made of it (division",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": -5}},
            "no learning rate can be made of it (float",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "missing 1 required positional argument: 'num_decay_steps'"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "steep"}},
            "Unknown decay type: steep",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2, "min_lr_ratio": 3}},
            "would be 0.002: expected 0 to --learning_rate, 0.001",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1e400}}, "num_cycles is inf: expected finite"),
        ({"lr_scheduler_type": "linear", "max_steps": 1, "warmup_steps": 1}, "the learning rate would be 0 at each of 1 steps"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "constant has no warm-up; constant_with_warmup has"),
    ],
)
def test_a_schedule_without_a_rate_to_train_with_is_one_line(tmp_path, settings, line):
    with pytest.raises(InputError) as error:
        GRPOConfig(output_dir=str(tmp_path), **(RATE | settings))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("lr_scheduler_kwargs", '{"min_lr": NaN}', "min_lr is nan"),
        ("lr_scheduler_kwargs", '{"min_lr": 1e999}', "min_lr is inf"),
        ("lr_scheduler_kwargs", {"min_lr": -math.inf}, "min_lr is -inf"),
        ("gradient_checkpointing_kwargs", '{"debug": [1, Infinity]}', "debug.1 is inf"),
        ("accelerator_config", '{"split_batches": NaN}', "split_batches is nan"),
        ("deepspeed", '{"optimizer": {"params": [{"lr": NaN}]}}', "optimizer.params.0.lr is nan"),
        ("deepspeed", "file.json", "gradient_clipping is inf"),
        ("deepspeed", '{"a": ' * 800 + "NaN" + "}" * 800, "is nan"),
    ],
)
def test_json_settings_hold_finite_numbers_only(tmp_path, monkeypatch, name, value, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text('{"gradient_clipping": Infinity}')
    with pytest.raises(InputError) as error:
        MaskConfig(output_dir=str(tmp_path), **{name: value})
    assert str(error.value).startswith(f"--{name}: ") and str(error.value).endswith(f"{place}: expected finite numbers")


@pytest.mark.parametrize("config", [GRPOConfig, SFTConfig, MaskConfig])
@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"},
        {"optim": "rmsprop", "optim_args": "alpha=0.9,centered=no"},
        {"optim": "adagrad", "optim_args": "lr_decay=0.1"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
        {"lr_scheduler_type": "inverse_sqrt"},
        {"lr_scheduler_type": "polynomial", "warmup_steps": 9},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
        {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 20, "decay_type": "1-sqrt"}},
        {"max_steps": -1, "warmup_steps": 5000},
        {"max_steps": 10_000_000},
    ],
)
def test_what_trains_is_taken(tmp_path, config, settings):
    config(output_dir=str(tmp_path), **({"learning_rate": 1e-3, "max_steps": 10} | settings))


def test_the_rates_looked_at_are_of_the_whole_run():
    assert optimization._spread(3) == [0, 1, 2, 2, 3]
    spread = optimization._spread(1_000_000)
    assert len(spread) == optimization.MOST_RATES + 2 and spread[0] == 0 and spread[-2:] == [999_999, 1_000_000]


def test_a_schedule_is_tried_again_when_its_steps_are_known(tmp_path):
    """Two epochs of one step: the rows decide that the warm-up fills the run."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, **settings, lr_scheduler_type="polynomial", warmup_steps=2)
    with pytest.raises(InputError, match="--lr_scheduler_type polynomial, --warmup_steps 2: no learning rate can be made of it"):
        trainer.train()
    with pytest.raises(InputError, match="linear, --warmup_steps 1: the learning rate would be 0 at each of 1 steps"):
        make_trainer(tmp_path, **settings | {"num_train_epochs": 1}, lr_scheduler_type="linear", warmup_steps=1).train()


def test_a_warm_up_of_a_share_leaves_a_step_to_train_in(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, warmup_steps=0.1)
    assert [args.get_warmup_steps(steps) for steps in (1, 2, 10, 11)] == [0, 1, 1, 2]
    trainer = make_trainer(tmp_path, max_steps=1, warmup_steps=0.1)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr_scheduler_type": "linear"}, "is a schedule of its own: --lr_scheduler_type linear has no place beside it"),
        ({"lr_scheduler_kwargs": {"min_lr_rate": 0.5}}, "is a schedule of its own: --lr_scheduler_kwargs has no place beside it"),
        ({"warmup_steps": 0.1}, "is a schedule of its own, without a warm-up: --warmup_steps 0.1 has no place beside it"),
    ],
)
def test_the_published_cosine_has_no_other_schedule_beside_it(tmp_path, settings, line):
    with pytest.raises(InputError) as error:
        MaskConfig(output_dir=str(tmp_path), cosine_epochs=20, **settings)
    assert str(error.value) == f"--cosine_epochs 20 {line}"


def test_the_published_cosine_falls_and_never_rises_above_the_rate(tmp_path):
    """Also where the rate is lower than the one it falls to."""
    for rate in (1e-3, 1e-7):
        trainer = make_trainer(tmp_path, learning_rate=rate, cosine_epochs=3, max_steps=6)
        weight = torch.nn.Parameter(torch.zeros(1))
        (factor,) = trainer.create_scheduler(6, torch.optim.SGD([weight], lr=rate)).lr_lambdas
        rates = [rate * factor(step) for step in range(7)]
        assert rates[0] == rate and all(low <= high for high, low in zip(rates, rates[1:], strict=False))
        assert rates[-1] == pytest.approx(min(rate, 1e-6))


@pytest.mark.parametrize(
    ("main", "flags", "line"),
    [
        (medr1_sft, ["--optim_args", "beta1=0.5"], "--optim_args beta1=0.5: --optim "),
        (prs_med_train, ["--lr_scheduler_kwargs", json.dumps({"min_lr": 1})], "--lr_scheduler_kwargs {'min_lr': 1}: "),
        (prs_med_train, ["--compat", "reference", "--warmup_steps", "3"], "--cosine_epochs 20 is a schedule of its own"),
    ],
)
def test_a_recipe_refuses_before_it_loads_anything(tmp_path, main, flags, line):
    with pytest.raises(InputError) as error:
        main(["--output_dir", str(tmp_path / "run"), *flags])
    assert line in str(error.value) and not (tmp_path / "run").exists()
