"""What a command prints and how it ends."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import RunFolder
from engine.command.settings import setting
from engine.errors import InputError, Interrupted

ROOT = Path(__file__).resolve().parents[3]


def command(body: str, folder: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run a small recipe whose main has this body, in a process of its own."""
    lines = [
        "from engine.command.main import *",
        "from engine.command.run_folder import *",
        "def main(argv):",
        *(f"    {line}" for line in body.splitlines()),
        "run_command(main)",
    ]
    path = folder / "recipe.py"
    path.write_text("\n".join(lines))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *launcher, path], capture_output=True, text=True, env=env, cwd=folder, timeout=120)


def test_only_the_headline_goes_to_standard_output(tmp_path):
    done = command("print('chatty')\nimport os; os.system('echo from below')\nreturn {'accuracy': 2 / 3, 'n': 3}", tmp_path)
    assert done.stdout == '{"accuracy": 0.666667, "n": 3}\n'
    assert "chatty" in done.stderr and "from below" in done.stderr
    assert done.returncode == 0


def test_a_bug_of_ours_keeps_its_traceback(tmp_path):
    done = command("raise KeyError('x')", tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "error, code, line",
    [
        (InputError("train.json: row 17: no key 'image'"), 2, "error: train.json: row 17: no key 'image'"),
        (InputError("Caught InputError in worker 0.\nTraceback:\nengine.errors.InputError: row 3: gone"), 2, "error: row 3: gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("stopped at step 3; saved in runs/x"), 130, "stopped at step 3; saved in runs/x"),
    ],
)
def test_endings_are_one_line_and_a_code(capsys, error, code, line):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main, [])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err) == (code, "", line + "\n")


@dataclass
class Steps:
    """How long it takes."""

    steps: int = setting(3, "How many.")


def parse_steps(argv):
    parse_arguments(Steps, argv, recipe="demo")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stepz", "3"], "unknown flag --stepz, did you mean --steps?"),
        (["--steps", "three"], "argument --steps: invalid int value: 'three'"),
    ],
)
def test_a_mistyped_flag_is_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        run_command(parse_steps, argv)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message} (--help lists the flags)\n"


def test_help_stays_on_standard_output(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(parse_steps, ["--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: python -m recipes.demo")


def test_two_processes_agree_on_one_folder_and_the_first_one_writes(tmp_path):
    body = """from pathlib import Path
from engine.processes import rank
run = open_run("demo")
run.append_metrics({"step": 1, "rank": rank()})
Path(f"rank{rank()}").write_text(str(run.path))
return {"rank": rank()}"""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    done = command(body, tmp_path, launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{"rank": 0}\n'
    folders = {(tmp_path / f"rank{r}").read_text() for r in range(2)}
    assert len(folders) == 1
    assert RunFolder(tmp_path / folders.pop()).read_metrics() == [{"step": 1, "rank": 0}]
