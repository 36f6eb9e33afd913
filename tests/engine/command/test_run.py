"""What a command prints, how it ends, and what its run folder keeps."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.command.run import RunFolder, describe_device, open_run, plain, run_command
from engine.errors import InputError, Interrupted

ROOT = Path(__file__).resolve().parents[3]


def command(body: str, folder: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run a small recipe whose main has this body, in a process of its own."""
    lines = [
        "from engine.command.run import *",
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


def test_a_mistyped_flag_is_one_line(capsys):
    def main(argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--steps", type=int)
        parser.parse_args(argv)

    with pytest.raises(SystemExit) as end:
        run_command(main, ["--stepz", "3"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --stepz 3 (--help lists the flags)\n"


def test_help_stays_on_standard_output(capsys):
    def main(argv):
        argparse.ArgumentParser(prog="recipe").parse_args(argv)

    with pytest.raises(SystemExit) as end:
        run_command(main, ["--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: recipe")


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


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_run("demo").path != open_run("demo").path


def test_an_output_folder_that_is_a_file_is_bad_input(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken: cannot be the output folder"):
        open_run("demo", tmp_path / "taken")


def test_a_resumed_run_rewrites_its_later_rows(tmp_path):
    run = open_run("demo", tmp_path / "run")
    for step in range(1, 6):
        run.append_metrics({"step": step, "reward": torch.tensor(0.5), "kl": float("nan")})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    run.truncate_metrics(4)
    run.append_metrics({"step": 4, "reward": 1.0})
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4]
    assert run.read_metrics()[0] == {"step": 1, "reward": 0.5, "kl": None}


def test_other_processes_do_not_write(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = open_run("demo", tmp_path / "run")
    run.append_metrics({"step": 1})
    run.write_json("config.json", {})
    run.truncate_metrics(1)
    assert list(run.path.iterdir()) == []


def test_config_is_plain_json(tmp_path):
    run = open_run("demo", tmp_path / "run")
    run.write_json("config.json", {"dtype": torch.float32, "path": Path("a"), "lr": 1e-6, 3: (True, float("inf"))})
    written = json.loads((run.path / "config.json").read_text())
    assert written == {"dtype": "torch.float32", "path": "a", "lr": 1e-6, "3": [True, None]}


def test_headline_floats_keep_six_digits_of_any_size():
    assert plain({"a": 123456.789, "b": 1.23456789e-7}, digits=6) == {"a": 123457.0, "b": 1.23457e-07}


def test_the_device_is_named(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name() in describe_device()
    else:
        assert describe_device() == "cpu (2 threads)"
