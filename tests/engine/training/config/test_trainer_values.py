"""What the Trainer would find late, or in a traceback, is one line that names flag and value."""

import json

import pytest

from engine.errors import InputError
from engine.training.config import trainer_values
from engine.training.config.grpo import GRPOConfig
from engine.training.config.masks import MaskConfig
from engine.training.config.sft import SFTConfig


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"deepspeed": "{bad"}, "--deepspeed {bad: not JSON ("),
        (
            {"deepspeed": "nowhere.json"},
            "--deepspeed nowhere.json: No such file or directory (expected a JSON object or the name of",
        ),
        ({"deepspeed": "7"}, "--deepspeed 7: No such file"),
        ({"deepspeed": "list.json"}, "--deepspeed list.json: expected a JSON object"),
        ({"deepspeed": "cut.json"}, "--deepspeed cut.json: not JSON ("),
        ({"deepspeed": "bytes.json"}, "--deepspeed bytes.json: no text"),
        ({"deepspeed": "."}, "--deepspeed .: a folder"),
        ({"lr_scheduler_kwargs": "[1]"}, "--lr_scheduler_kwargs [1]: expected a JSON object"),
        ({"lr_scheduler_kwargs": "min_lr=1"}, "--lr_scheduler_kwargs min_lr=1: not JSON ("),
        ({"lr_scheduler_kwargs": '{"a": 1, "a": 2}'}, "not JSON ('a' is given twice; expected an object)"),
        ({"deepspeed": '{"zero": {"stage": 1, "stage": 2}}'}, "not JSON ('stage' is given twice; expected an object"),
        ({"lr_scheduler_kwargs": '{"nonsense": 1}'}, "--lr_scheduler_kwargs: 'nonsense' is not known there"),
        (
            {"lr_scheduler_kwargs": {"min_lr": 1}, "lr_scheduler_type": "cosine"},
            "'min_lr' is not known there (expected some of num_cyc",
        ),
        ({"gradient_checkpointing_kwargs": "5"}, "--gradient_checkpointing_kwargs 5: expected a JSON object"),
        ({"gradient_checkpointing_kwargs": {"a": 1}}, "'a' is not known there (expected some of context_fn"),
        ({"accelerator_config": {"a": 1}}, "--accelerator_config: 'a' is not known there"),
        ({"accelerator_config": "[" * 100_000}, "--accelerator_config ["),
        ({"optim_args": "a=b=c"}, "--optim_args a=b=c: expected name=value"),
        ({"optim_args": "fast"}, "--optim_args fast: expected name=value"),
        ({"report_to": "nonsense"}, "--report_to nonsense: expected none, all or some of "),
    ],
)
@pytest.mark.parametrize("config", [GRPOConfig, SFTConfig, MaskConfig])
def test_a_value_that_means_nothing_is_one_line(tmp_path, monkeypatch, config, settings, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text('{"a": ')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError) as error:
        config(output_dir=str(tmp_path / "run"), **settings)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_deepspeed_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_values.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--deepspeed: deepspeed is not installed \(pip install 'vesalius\[scale\]'\)"):
        GRPOConfig(output_dir=str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}})


def test_what_means_something_is_taken(tmp_path):
    kwargs = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": json.dumps({"min_lr_rate": 0.1})}
    more = {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "accelerator_config": '{"dispatch_batches": false}'}
    args = SFTConfig(output_dir=str(tmp_path), optim_args="", report_to=["none"], **kwargs, **more)
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and args.accelerator_config.dispatch_batches is False
