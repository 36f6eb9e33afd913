"""Numbers that make no sense are refused before anything is loaded: asked of every recipe's dataclasses themselves."""

import importlib
import math
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import DataArguments, ModelArguments, limits_of, out_of_range, usable_attention
from engine.errors import InputError
from engine.training.config.grpo import GRPOConfig
from engine.training.config.masks import MaskConfig
from engine.training.config.sft import SFTConfig
from recipes import medr1_grpo, prs_med_train
from recipes.__main__ import list_recipes

RECIPES = [name for of_system in list_recipes().values() for name in of_system]
# Any finite number may weigh a reward.
FREE = {"reward_weights"}


def settings_of(recipe: str) -> list[type]:
    """The dataclasses whose fields are a recipe's flags."""
    found = vars(importlib.import_module(recipe)).values()
    return [kind for kind in found if isinstance(kind, type) and is_dataclass(kind) and any(f.metadata for f in fields(kind))]


def numeric(kind: type) -> dict[str, type]:
    """{setting: int or float} of those that hold numbers, one or a list of them."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        inside = {hint, *typing.get_args(hint), *(part for inner in typing.get_args(hint) for part in typing.get_args(inner))}
        for number in (int, float):
            if number in inside and name in {field.name for field in fields(kind)}:
                found[name] = number
    return found


KINDS = sorted({kind for recipe in RECIPES for kind in settings_of(recipe)}, key=lambda kind: f"{kind.__module__}.{kind.__name__}")


def test_the_settings_of_every_recipe_are_found():
    assert {GRPOConfig, SFTConfig, MaskConfig, DataArguments, ModelArguments} <= set(KINDS) and len(KINDS) > 15
    assert sum(len(numeric(kind)) for kind in KINDS) > 150


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_range(kind):
    without = [name for name in numeric(kind) if not limits_of(kind, name) and name not in FREE]
    assert not without, f"{kind.__name__}: say what {', '.join(without)} may be (at_least=, more_than=, at_most=, less_than=)"


def outside(kind: type, name: str) -> list[str]:
    """Numbers as flags that nobody means, and those next to the limits on the wrong side."""
    limits, whole = limits_of(kind, name), numeric(kind)[name] is int
    step = 1 if whole else 1e-3
    near = [limits["at_least"] - step] if "at_least" in limits else [limits["more_than"]] if "more_than" in limits else []
    near += [limits["at_most"] + step] if "at_most" in limits else [limits["less_than"]] if "less_than" in limits else []
    return ["nan", "inf", "-inf", "1e400", "-1", "0", "99999999999999999999999", *(f"{int(n) if whole else n}" for n in near)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_out_of_range_is_one_line_and_one_in_range_is_taken(kind):
    required = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    needed = [part for name in required for part in (f"--{name}", "x")]
    for name, number in numeric(kind).items():
        for text in outside(kind, name):
            try:
                value = number(text)
                fits = out_of_range(value, limits_of(kind, name)) is None
            except (ValueError, OverflowError):
                fits = False
            try:
                (made,) = parse_arguments(kind, [*needed, f"--{name}={text}"], recipe="demo")
            except InputError as error:
                assert name in str(error) and "\n" not in str(error), (name, text, str(error))
                assert not fits or "expected" in str(error) or "supported" in str(error), (name, text, str(error))
            else:
                assert fits and getattr(made, name) in (value, [value]) and math.isfinite(value), (name, text)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--learning_rate", "nan"], "--learning_rate nan: expected a number, more than 0"),
        (["--eval_limit", "-5"], "--eval_limit -5: expected a number, at least 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0.0: expected a number, more than 0 and at most 1000000"),
        (["--max_steps", "0"], "--max_steps 0: expected at least 1, or -1 for --num_train_epochs"),
        (["--save_steps", "0"], "--save_steps 0.0: expected a number, more than 0"),
        (["--warmup_steps", "20", "--max_steps", "10"], "--warmup_steps 20: expected at most --max_steps, 10"),
        (["--epsilon_high", "-0.1"], "--epsilon_high -0.1: expected a number, at least 0"),
        (["--epsilon_high", "1e300"], "--epsilon_high 1e+300: expected a number, at least 0 and at most 3.4e+38"),
        (["--delta", "1.1"], "--delta 1.1: expected more than 1 + --epsilon, 1.2"),
        (["--reward_weights", "1", "nan"], "--reward_weights 1.0 nan: expected a finite number"),
        (["--reward_weights", "0", "0"], "--reward_weights 0.0 0.0: expected one that is not 0"),
        (["--reward_weights", "2"], "--reward_weights 2.0: expected 2 numbers, one for each of accuracy, format"),
        (["--min_pixels", "99", "--max_pixels", "98"], "--min_pixels 99: expected at most --max_pixels, 98"),
        (["--seed", "4294967296"], "--seed 4294967296: expected a number, at least 0 and at most 4294967295"),
        (["--num_generations", "4000000000"], "--num_generations 4000000000: expected a number, at least 2 and at most 2147483647"),
        (["--lr_scheduler_type", "sideways"], "invalid choice: 'sideways'"),
    ],
)
def test_a_senseless_setting_ends_a_training_run_at_once(tmp_path, capsys, flags, line):
    with pytest.raises(SystemExit) as end:
        run_command(medr1_grpo.main, [*flags, "--output_dir", str(tmp_path / "run")])
    assert end.value.code == 2 and line in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("run/checkpoint*"))


def test_a_value_set_by_a_program_is_held_to_the_same_ranges(tmp_path):
    with pytest.raises(InputError, match="--learning_rate inf: expected"):
        MaskConfig(output_dir=str(tmp_path), learning_rate=float("inf"))
    with pytest.raises(InputError, match="--eval_limit -1: expected"):
        DataArguments(eval_limit=-1)
    with pytest.raises(InputError, match="--min_pixels 9: expected at most --max_pixels, 4"):
        ModelArguments(min_pixels=9, max_pixels=4)


def test_a_yaml_value_out_of_range_names_file_and_flag(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("lora_alpha: 0\n")
    with pytest.raises(SystemExit) as end:
        run_command(prs_med_train.main, ["--config", str(tmp_path / "c.yaml")])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {Path(tmp_path / 'c.yaml')}: --lora_alpha 0: expected a number, at least 1\n")


@pytest.mark.parametrize(
    ("installed", "bf16", "dtype", "used", "said"),
    [
        (True, True, None, "flash_attention_2", ""),
        (True, False, None, "sdpa", "it has no float32 (expected --bf16); using sdpa"),
        (True, False, "bfloat16", "flash_attention_2", ""),
        (False, True, None, "sdpa", "flash-attn is not installed; using sdpa"),
    ],
)
def test_flash_attention_is_never_handed_float32(monkeypatch, caplog, installed, bf16, dtype, used, said):
    """Weights in float32 reach it in bfloat16 under --bf16's autocast, and not without."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a spec" if installed else None)
    arguments = ModelArguments(attn_implementation="flash_attention_2", dtype=dtype)
    assert arguments.load_options(bf16)["attn_implementation"] == used
    assert said in caplog.text and bool(said) == bool(caplog.text)


@pytest.mark.parametrize(
    "installed, half, used",
    [(True, True, "flash_attention_2"), (True, False, "sdpa"), (False, True, "sdpa"), (False, False, "sdpa")],
)
def test_automatic_attention_is_the_fastest_that_can_be_had_without_a_word(monkeypatch, caplog, installed, half, used):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a spec" if installed else None)
    assert usable_attention("auto", half=half) == used and usable_attention("eager", half=half) == "eager" and not caplog.text
