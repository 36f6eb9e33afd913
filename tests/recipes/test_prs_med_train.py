"""`recipes.prs_med_train`: what a short starter run leaves, resuming, reloading to the same bits, and mistakes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from engine.data.masked_questions import load_masked_questions
from engine.data.starter.masked_questions import build_lesions
from engine.errors import InputError
from engine.runs.evaluate import evaluate
from engine.tasks.masks import MaskAnswers, MaskTask
from engine.training.checkpoints import newest_checkpoint
from models.prs_med.model import load_prs_med
from recipes.prs_med_train import main

SHORT = ["--warm_up_steps", "2", "--max_steps", "4", "--batch_size", "4", "--save_strategy", "steps", "--save_steps", "2"]
SHORT += ["--eval_limit", "4", "--learning_rate", "1e-3", "--report_to", "none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run and what its main returned."""
    folder = tmp_path_factory.mktemp("run")
    return folder, main([*SHORT, "--output_dir", str(folder)])


def segment_rows(model):
    rows = load_masked_questions(build_lesions(), split="test", limit=3)
    return model.segment_batch([row["image"] for row in rows], [row["question"] for row in rows], max_new_tokens=8)


def test_a_run_leaves_what_it_promises(run):
    folder, headline = run
    measured = {f"{name}_{when}" for name in ("dice", "place_accuracy") for when in ("before", "after")}
    assert set(headline) == measured | {"majority_accuracy", "seconds", "checkpoint"}
    assert 0 <= headline["dice_before"] <= 1 and 0 <= headline["dice_after"] <= 1
    assert str(headline["checkpoint"]) == str(folder / "checkpoint-4")
    for name in (
        "config.json",
        "metrics.jsonl",
        "evaluation_before.json",
        "evaluation_after.json",
        "table_after.csv",
        "curves.png",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0, name
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and all(row["loss/mask"] > 0 for row in steps)


def test_the_checkpoint_gives_the_masks_of_its_evaluation(run):
    """What was measured right after training is what the folder gives when it is loaded again: every digit, every answer."""
    folder, headline = run
    test = load_masked_questions(build_lesions(), split="test")
    test = test.select(i * len(test) // 4 for i in range(4))
    answers = MaskAnswers(load_prs_med(headline["checkpoint"]).segment_batch)
    evaluate(answers, MaskTask(), test, batch_size=8, progress=False).write(folder / "again.json")
    again, after = (json.loads((folder / name).read_text()) for name in ("again.json", "evaluation_after.json"))
    assert again["results"] == after["results"] and again["table"] == after["table"]


@pytest.mark.parametrize("flags", [["--compat", "reference"], ["--bf16", "true", "--gradient_checkpointing", "true"]])
def test_other_ways_to_train_end_too(tmp_path, flags):
    headline = main([*SHORT, *flags, "--max_steps", "2", "--output_dir", str(tmp_path)])
    assert len(segment_rows(load_prs_med(headline["checkpoint"]))) == 3


def test_a_stopped_run_resumes_to_the_same_bits(run, tmp_path):
    folder, headline = run
    first = main([*SHORT, "--output_dir", str(tmp_path), "--max_steps", "4"])
    (tmp_path / "checkpoint-4").rename(tmp_path / "later")  # as if it had stopped after step 2
    with pytest.raises(InputError, match="already holds checkpoint-2; pass --resume_from_checkpoint true"):
        main([*SHORT, "--output_dir", str(tmp_path)])
    resumed = main([*SHORT, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "true"])
    for name in ("dice_before", "place_accuracy_before"):
        assert resumed[name] == first[name] == headline[name]
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    for (_, x), (_, y) in zip(
        segment_rows(load_prs_med(resumed["checkpoint"])), segment_rows(load_prs_med(headline["checkpoint"])), strict=True
    ):
        assert torch.equal(x, y)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_resumed_run_goes_on_with_the_language_model_that_its_adapters_were_trained_on(run, tmp_path):
    """Whatever the flags would build: it is read from the checkpoint."""
    folder, headline = run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    main([*SHORT, "--output_dir", str(tmp_path), "--warm_up_steps", "0", "--resume_from_checkpoint", "true"])
    weights = [load_file(path / "checkpoint-4" / "vlm" / "model.safetensors") for path in (folder, tmp_path)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vlm_path", "somewhere"], "--vlm_path and --sam_ckpt belong together"),
        (["--data_root", "nowhere"], "nowhere: no such folder"),
        (["--vlm_path", "./nowhere", "--sam_ckpt", "no.pth"], r"--vlm_path, --sam_ckpt: \./nowhere: no checkpoint there"),
        (["--epoch", "3"], r"unknown flag --epoch, did you mean --epochs\?"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        main([*flags, "--output_dir", str(tmp_path)])
