"""A YAML file of settings: read as the flags would be, and one line that names file and setting where it cannot be."""

import os
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.command.arguments import parse_arguments
from engine.command.settings import setting
from engine.errors import InputError
from tests.fuzz import bounded


@dataclass
class Settings:
    """What is set."""

    learning_rate: float = setting(1e-6, "Peak learning rate.", more_than=0)
    steps: int = setting(3, "How many.", at_least=1, aliases=["--epochs"])
    bf16: bool = setting(True, "Short floats.")
    limit: int | None = setting(7, "How many rows.", at_least=1)
    names: list[str] = setting([], "Which ones.")
    weights: list[float] | None = setting(None, "How much of each.")
    kind: str = setting("one", "Of which kind.", choices=["one", "no", "384"])
    details: dict | str | None = setting(None, "Anything.")
    resume: str | None = setting(None, "From where.")


def read(folder, content: str | bytes) -> Settings:
    path = folder / "c.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (settings,) = parse_arguments(Settings, ["--config", str(path)], recipe="demo")
    return settings


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("names: folder", "names", ["folder"]),
        ("names: [a, b]", "names", ["a", "b"]),
        ("names: []", "names", []),
        ("names:\n- 1\n- no", "names", ["1", "no"]),
        ("weights: 2", "weights", [2.0]),
        ("weights: [1, 1e-1]", "weights", [1.0, 0.1]),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("bf16: no", "bf16", False),
        ("bf16: 'false'", "bf16", False),
        ("kind: no", "kind", "no"),
        ("kind: 384", "kind", "384"),
        ("resume: true", "resume", "true"),
        ("limit:", "limit", None),
        ("limit: ~", "limit", None),
        ("epochs: 9", "steps", 9),
        ("learning-rate: 2", "learning_rate", 2.0),
        ("details: {min_lr: 1e-6, deep: [1, {a: null}]}", "details", {"min_lr": 1e-6, "deep": [1, {"a": None}]}),
        ("\ufeffsteps: 4", "steps", 4),
        ("names: [&a b, *a]", "names", ["b", "b"]),
    ],
)
def test_a_value_means_what_its_flag_would(tmp_path, text, name, value):
    assert getattr(read(tmp_path, text), name) == value


BOMB = "details:\n  a0: &a0 [x]\n" + "".join(f"  a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9))


@pytest.mark.parametrize(
    "content, message",
    [
        ("steps: yes", "c.yaml: steps: 'yes' (expected a whole number)"),
        ("steps: 2.5", "c.yaml: steps: '2.5' (expected a whole number)"),
        ("steps: [1, 2]", "c.yaml: steps: a list (expected a single value)"),
        ("steps: {a: 1}", "c.yaml: steps: a mapping (expected a single value)"),
        ("steps:", "c.yaml: steps: no value (expected one)"),
        ("learning_rate: fast", "c.yaml: learning_rate: 'fast' (expected a number)"),
        ("learning_rate: .nan", "c.yaml: learning_rate: '.nan' (expected a number)"),
        ("learning_rate: nan", "c.yaml: --learning_rate nan: expected a number, more than 0"),
        ("weights: [1, inf]", "c.yaml: --weights 1.0 inf: expected a finite number"),
        ("weights: [[1], 2]", "c.yaml: weights: a list (expected a single value)"),
        ("names: {a: b}", "c.yaml: names: a mapping (expected a list)"),
        ("names: {a: b, <<: {c: d}}", "c.yaml: names: a mapping (expected a list)"),
        ("bf16: perhaps", "c.yaml: bf16: "),
        ("kind: three", "c.yaml: kind: 'three' (expected one of one, no, 384)"),
        ('resume: "a\\0b"', "c.yaml: resume: a text with a zero character"),
        ("details: {a: .inf}", "c.yaml: details: a mapping that JSON cannot hold"),
        ("details: {a: !!python/object/apply:os.system [ls]}", "c.yaml: details: a mapping that JSON cannot hold"),
        ("details: {[a]: b}", "c.yaml: details: a mapping that JSON cannot hold"),
        ("stepz: 3", "c.yaml: unknown setting 'stepz', did you mean --steps?"),
        ("help: 3", "c.yaml: unknown setting 'help'"),
        ("no_bf16: 3", "c.yaml: unknown setting 'no_bf16'"),
        ("steps: 3\nsteps: 4", "c.yaml: steps: given twice"),
        ("steps: 3\nepochs: 4", "c.yaml: epochs: given twice"),
        ("details:\n  a: 1\n  a: 2", "c.yaml: not YAML ('a' in line 2 is given twice)"),
        ("details: {b: {a: 1, 'a': 2}}", "c.yaml: not YAML ('a' in line 1 is given twice)"),
        ("? [a]\n: 3", "c.yaml: line 1: expected the name of a setting before the colon"),
        ("", "c.yaml: empty (expected settings"),
        ("# nothing\n", "c.yaml: empty (expected settings"),
        ("- steps", "c.yaml: a list (expected settings"),
        ("steps", "c.yaml: a single value (expected settings"),
        ("steps: 3\n\tlimit: 4", "c.yaml: not YAML (found character '\\t' that cannot start any token in line 2)"),
        ("steps: 3\n---\nsteps: 4", "c.yaml: not YAML (but found another document in line 2)"),
        ("steps: \x1b[31m3", "c.yaml: not YAML (unacceptable character"),
        (b"names: caf\xe9", "c.yaml: not UTF-8 text"),
        ("steps: 3".encode("utf-16"), "c.yaml: not UTF-8 text"),
        (b"names: " + b"a" * 300_000, "c.yaml: longer than 262144 bytes"),
        ("names: " + "[" * 5000, "c.yaml: nested too deeply"),
        ("details: " + "[" * 40 + "]" * 40, "c.yaml: not YAML (nested too deeply)"),
        (BOMB, "c.yaml: more than 10000 values"),
        ("details: &a {b: *a}", "c.yaml: more than 10000 values"),
        ("env: [A]", "c.yaml: env: expected a mapping of names to values"),
        ("env: {A=B: 1}", "c.yaml: env: expected a mapping of names to values"),
    ],
)
def test_what_a_file_cannot_mean_is_one_line_with_file_and_setting(tmp_path, content, message):
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_may_set_environment_variables_as_in_trl(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_A", "before")
    assert read(tmp_path, "env: {DEMO_A: yes}\nsteps: 4").steps == 4 and os.environ["DEMO_A"] == "yes"


@pytest.mark.parametrize("argv", [["--config", "a", "--config", "b"], ["--config=a", "--config=b"]])
def test_one_config_file_is_one(argv):
    with pytest.raises(InputError, match="--config: expected one file, not several"):
        parse_arguments(Settings, argv, recipe="demo")


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(InputError, match="Is a directory"):
        parse_arguments(Settings, ["--config", str(tmp_path)], recipe="demo")


def test_no_file_beside_the_program_sets_anything(tmp_path, monkeypatch):
    (tmp_path / "recipe.args").write_text("--steps 99")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "recipe.py")])
    assert parse_arguments(Settings, [], recipe="demo")[0].steps == 3


NAMES = ["learning_rate", "steps", "bf16", "limit", "names", "weights", "kind", "details", "resume", "env", "<<", "other"]
WORDS = st.one_of(
    st.sampled_from(
        ["yes", "no", "1e-4", ".nan", "nan", "-1", "0", "~", "[a, b]", "{a: 1}", "&a [*a]", "*b", "!!set {a}", "|\n x"]
    ),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)
LINES = st.lists(st.tuples(st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), WORDS), max_size=4)


@bounded(4_000)  # a parser is built for each
@given(st.one_of(LINES.map(lambda lines: "\n".join(f"{name}: {value}" for name, value in lines).encode()), st.binary(max_size=60)))
def test_fuzz_any_file_gives_settings_or_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    try:
        settings = read(folder, content)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert settings.steps >= 1 and settings.learning_rate > 0 and all(isinstance(name, str) for name in settings.names)
