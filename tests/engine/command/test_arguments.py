"""Flags and YAML files, and what is said of those that cannot be used."""

from dataclasses import dataclass, field

import pytest

from engine.command.arguments import parse_arguments
from engine.command.settings import REQUIRED, setting
from engine.errors import InputError


@dataclass
class Settings:
    """What all share."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    steps: int = field(default=3, metadata={"help": "How many."})
    bf16: bool = field(default=False, metadata={"help": "Short floats."})
    tf32: bool | None = field(default=None, metadata={"help": "Shorter products. None: where there is a GPU."})

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("--steps must be at least 1\nand here is a page of advice")


def parse(*argv) -> Settings:
    (settings,) = parse_arguments(Settings, list(argv), recipe="demo", description="A demo.\n\n    with a table")
    return settings


@pytest.mark.parametrize("flags, value", [([], None), (["--tf32"], True), (["--tf32", "true"], True), (["--tf32", "no"], False)])
def test_a_switch_that_may_be_left_open_needs_no_value(flags, value):
    assert parse(*flags, "--steps", "4").tf32 is value


def test_a_flag_that_is_not_taken_is_refused_with_what_there_is_instead():
    with pytest.raises(InputError, match="^--device is not taken: the GPU is chosen elsewhere$"):
        parse_arguments(Settings, ["--device=cuda:0"], recipe="demo", refused={"--device": "the GPU is chosen elsewhere"})


@pytest.mark.parametrize("value", ["-1", "-.5", "-1e-3", "-2E5"])
def test_a_value_may_be_negative_however_it_is_written(value):
    assert parse("--learning_rate", value).learning_rate == float(value)


def test_flags_go_on_top_of_the_config_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("steps: 5\nlearning_rate: 1e-5\n")
    assert parse("--config", str(file), "--steps", "7", "--bf16") == Settings(1e-5, 7, True)
    assert parse(f"--config={file}") == Settings(1e-5, 5, False)


def test_a_recipes_defaults_give_way_to_the_starter_settings_a_config_file_and_flags(tmp_path):
    def steps_of(*argv) -> tuple[int, float]:
        own, starter = {"steps": 5, "learning_rate": 1e-3}, {"steps": 2}
        (settings,) = parse_arguments(Settings, list(argv), recipe="demo", defaults=own, starter=starter)
        return settings.steps, settings.learning_rate

    file = tmp_path / "config.yaml"
    file.write_text("bf16: true\n")
    assert steps_of() == (2, 1e-3) and steps_of("--config", str(file)) == (5, 1e-3)
    file.write_text("steps: 7\n")
    assert steps_of("--config", str(file)) == (7, 1e-3) and steps_of("--steps", "9") == (9, 1e-3)


@dataclass
class Paths:
    """Where things are."""

    output: str = setting(REQUIRED, "The folder to make.", metavar="DIR")
    model_name_or_path: str | None = setting(None, "The model.")
    names: list[str] = setting([], "Which ones.")
    kind: str = setting("one", "Of which kind.", choices=["one", "two"])


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--model-name-or-path"])
def test_the_starter_settings_give_way_to_a_users_own_model_however_its_flag_is_spelt(flag):
    def kind_of(*argv, **options) -> str:
        (paths,) = parse_arguments(Paths, ["--output", "x", *argv], recipe="demo", starter={"kind": "two"}, **options)
        return paths.kind

    assert kind_of() == "two" and kind_of(flag, "mine") == "one" and kind_of(f"{flag}=mine") == "one"
    assert kind_of(flag, "mine", starter_unless=["names"]) == "two" and kind_of("--names", "a", starter_unless=["names"]) == "one"


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: --output (--help lists the flags)"),
        (["--output", "x", "--kind", "three"], "argument --kind: invalid choice: 'three' (choose from "),
    ],
)
def test_what_is_required_and_what_may_be_chosen_is_said_in_one_line(argv, message):
    with pytest.raises(InputError) as error:
        parse_arguments(Paths, argv, recipe="demo")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_list_is_each_instances_own():
    first, second = (parse_arguments(Paths, ["--output", "x"], recipe="demo")[0] for _ in range(2))
    first.names.append("a")
    assert second.names == [] and Paths("x").names == []


def test_help_shows_what_a_value_is_and_hides_empty_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Paths, ["--help"], recipe="demo")
    text = capsys.readouterr().out
    for shown in ("--output DIR ", "The folder to make. (required)\n", "--names STR ... ", "Which ones.\n", "--kind {one,two} "):
        assert shown in text
    assert "(default: one)" in text and "--help_all" not in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat, did you mean --learning_rate? (--help lists the flags)"),
        (["--step", "1"], "unknown flag --step, did you mean --steps? (--help lists the flags)"),
        (["stray"], "stray: expected a flag, not one more value (--help lists the flags)"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--config"], "--config: expected the name of a YAML file after it"),
        (["--config", "gone.yaml"], "--config gone.yaml: No such file or directory"),
    ],
)
def test_a_flag_that_cannot_be_used_is_one_line(argv, message):
    with pytest.raises(InputError) as error:
        parse(*argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz: 3", "config.yaml: unknown setting 'stepz', did you mean --steps?"),
        ("steps: [3", "config.yaml: not YAML"),
        ("- 3", "config.yaml: a list (expected settings, one a line, as `seed: 1`)"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_one_line(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        parse("--config", str(tmp_path / "config.yaml"))
    assert message in str(error.value) and "\n" not in str(error.value)


@dataclass
class OwnSettings(Settings):
    """What is new here.

    More words.
    """

    steps: int = field(default=4, metadata={"help": "How many here."})


def test_help_shows_the_docstring_and_each_default_the_recipes_own_flags_first(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(OwnSettings, ["--help"], recipe="demo", description="A demo.\n\n    with a table")
    text = capsys.readouterr().out
    order = ["\nWhat is new here:", "--steps INT", "\nWhat all share:", "--learning_rate FLOAT"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "--learning-rate" not in text
    assert text.startswith("usage: python -m recipes.demo [--config FILE.yaml]")
    assert "    with a table" in text and "Peak learning rate. (default: 1e-06)" in text
