"""Which folder a run gets, and what it keeps."""

import json
import os
from pathlib import Path

import pytest
import torch

from engine.command.run_folder import newest_output, open_run
from engine.errors import InputError
from engine.processes import check_environment


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
    run.truncate(4)
    run.append_metrics({"step": 4, "reward": 1.0})
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4]
    assert run.read_metrics()[0] == {"step": 1, "reward": 0.5, "kl": None}


def test_logged_answers_are_cut_with_the_metrics_and_stay_a_line_each(tmp_path):
    """Whatever separates lines elsewhere, and where the kill came within a letter of the last one."""
    run = open_run("demo", tmp_path)
    rows = [{"step": step, "completions": [{"text": f"{step}\u2028b\u2029c\x85ä"}]} for step in (1, 1, 2, 3)]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    cut = '{"step": 3, "completions": [{"text": "ä'.encode()[:-1]
    (tmp_path / "completions.jsonl").write_bytes(whole + cut)
    run.truncate(3)
    kept = (tmp_path / "completions.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in kept.splitlines()] == rows[:3]
    assert not (tmp_path / "metrics.jsonl").exists()  # what was not there is not made
    run.truncate(1)
    assert (tmp_path / "completions.jsonl").read_bytes() == b""


@pytest.mark.parametrize(("rank", "count"), [("1", ""), ("2", "2"), ("x", "2"), ("0", "two")])
def test_what_torchrun_sets_is_set_by_half_or_wrongly(monkeypatch, rank, count):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(InputError, match="expected"):
        check_environment()


def test_other_processes_do_not_write(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = open_run("demo", tmp_path / "run")
    run.append_metrics({"step": 1})
    run.write_json("config.json", {})
    run.truncate(1)
    assert list(run.path.iterdir()) == []


def test_config_is_plain_json(tmp_path):
    run = open_run("demo", tmp_path / "run")
    run.write_json("config.json", {"dtype": torch.float32, "path": Path("a"), "lr": 1e-6, 3: (True, float("inf"))})
    written = json.loads((run.path / "config.json").read_text())
    assert written == {"dtype": "torch.float32", "path": "a", "lr": 1e-6, "3": [True, None]}


def test_the_newest_output_of_a_recipe_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--model is missing: .*python -m recipes.train makes one"):
        newest_output("train", "model.json")
    for i, name in enumerate(["b/checkpoint-1", "a/checkpoint-2"]):
        folder = tmp_path / "runs/train" / name
        folder.mkdir(parents=True)
        (folder / "model.json").write_text("{}")
        os.utime(folder / "model.json", (i, i))
    assert newest_output("train", "model.json").name == "checkpoint-2"
