"""The evaluation and inference recipes from flags to files, with a random checkpoint in the real format."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.command.main import run_command
from engine.data.prepare.prs_med import SetPreparation, prepare_set
from engine.errors import InputError
from models.prs_med.model import PRSMed, PRSMedConfig, load_prs_med
from models.starter.llava import build_tiny_llava
from recipes.prs_med_eval import main as evaluate
from recipes.prs_med_infer import main as infer
from tests.judge_server import says, serve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "checkpoint-3"
    vlm, tokenizer = build_tiny_llava(["Where is the tumor in this image?", "The tumor is in the top left."])
    model = PRSMed(vlm, tokenizer, PRSMedConfig(image_encoder="starter"))
    model.prepare_training(r=2, alpha=4, dropout=0.0, frozen_norms=False)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two sets of five images of different sizes, all of them test rows."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for name in ("lung_CT", "prostate"):
        (folder / name).mkdir()
        for i in range(5):
            size = (40 + 4 * i, 50)
            Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name / f"case {i}.png")
            mask = np.zeros(size, np.uint8)
            mask[2:12, 3:15] = 255
            Image.fromarray(mask).save(folder / name / f"case {i}_mask.png")
        source = str(folder / name)
        prepare_set(SetPreparation(str(folder / "root"), name, source, source, fractions="0,0,1"))
    return folder / "root"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def ask(checkpoint, root, *flags: str, output: str = "run") -> dict:
    return evaluate(["--model", checkpoint, "--data_root", str(root), "--max_new_tokens", "4", "--output_dir", output, *flags])


def test_the_run_folder_holds_table_rows_masks_and_report(checkpoint, root):
    headline = ask(checkpoint, root, "--batch_size", "3", "--save_masks", "true")
    assert {path.name for path in Path("run").iterdir()} == {"config.json", "evaluation.json", "table.csv", "report.html", "masks"}
    assert headline["num_samples"] == 10 and headline["majority_accuracy"] == 1 and headline["output"] == "run"
    assert all(0 <= headline[name] <= 1 for name in ("mDice", "mIoU", "dice", "iou", "s_measure", "weighted_f", "mae", "unread"))
    lines = list(csv.DictReader(open("run/table.csv")))
    assert [(line["dataset"], line["num_samples"]) for line in lines] == [("lung_CT", "5"), ("prostate", "5"), ("all", "10")]
    results = json.loads(Path("run/evaluation.json").read_text())["results"]
    masks = sorted(Path("run/masks/prostate").iterdir())
    assert len(masks) == 5 and masks[0].name.endswith("_case_0.png")
    model = load_prs_med(checkpoint)
    result = next(result for result in results if result["image_id"] == "prostate/test_images/case_0.png")
    answer, logits = model.segment(Image.open(root / result["image_id"]), result["question"], max_new_tokens=4)
    kept = np.asarray(Image.open(next(path for path in masks if "case_0" in path.name)))
    assert np.abs(kept / 255 - torch.sigmoid(logits).numpy()).max() < 0.01 and result["model_answer"] == answer


def test_scores_do_not_depend_on_the_batch(checkpoint, root):
    headlines = [ask(checkpoint, root, "--batch_size", size, output=f"run{size}") for size in ("1", "4")]
    for name in ("mDice", "dice", "mae"):
        assert headlines[0][name] == pytest.approx(headlines[1][name], abs=2e-3)
    assert ask(checkpoint, root, "--ann_paths", "annotations/prostate.csv", "--limit", "2")["num_samples"] == 2


def test_a_judge_is_asked_over_the_network(checkpoint, root):
    with serve(lambda *_: says("Yes.")) as server:
        headline = ask(checkpoint, root, "--limit", "3", "--judge_url", server.url, "--judge_model", "qwen3")
    assert headline["judge_accuracy"] == 1 and headline["judge_std"] == 0 and len(server.bodies) == 9
    assert "The tumor is located in position top left" in server.bodies[0]["messages"][0]["content"]


def test_masks_and_answers_are_kept_when_the_judge_fails(checkpoint, root, capsys):
    with serve(lambda *_: (401, b"no key")) as server, pytest.raises(SystemExit) as end:
        flags = ["--model", checkpoint, "--data_root", str(root), "--limit", "1", "--max_new_tokens", "2", "--output_dir", "run"]
        run_command(evaluate, [*flags, "--judge_url", server.url, "--judge_model", "m"])
    assert end.value.code == 2 and "no answer from 'm' (HTTP 401 no key)" in capsys.readouterr().err.splitlines()[-1]
    assert len(json.loads(Path("run/evaluation.json").read_text())["results"]) == 1


def test_real_images_are_evaluated(checkpoint, mini_data):
    headline = ask(checkpoint, mini_data / "prs_med", "--limit", "2", "--compat", "reference")
    assert headline["num_samples"] == 2 and 0 < headline["mDice"] < 1


def test_inference_writes_the_mask_and_its_overlay(checkpoint, root):
    image, truth = root / "prostate/test_images/case_1.png", root / "prostate/test_masks/case_1.png"
    flags = ["--model", checkpoint, "--image", str(image), "--question", "Where is it?", "--max_new_tokens", "3"]
    result = infer([*flags, "--out", "out/m.png", "--mask", str(truth)])
    assert result["mask"] == "out/m.png" and result["overlay"] == "out/m.overlay.png"
    answer, logits = load_prs_med(checkpoint).segment(Image.open(image), "Where is it?", max_new_tokens=3)
    mask = np.asarray(Image.open("out/m.png"))
    assert np.array_equal(mask > 0, (logits > 0).numpy()) and result["answer"] == answer and set(np.unique(mask)) <= {0, 255}
    assert Image.open("out/m.overlay.png").size == Image.open(image).size == (50, 44)
    predicted, true = mask > 0, np.asarray(Image.open(truth)) > 0
    assert result["dice"] == pytest.approx(2 * (predicted & true).sum() / (predicted.sum() + true.sum()))
    assert "dice" not in infer(flags) and len(list(Path("runs/prs_med_infer").glob("*/mask.png"))) == 1


def test_the_published_inference_stretches_the_mask(checkpoint, root):
    image = root / "prostate/test_images/case_1.png"
    flags = ["--model", checkpoint, "--image", str(image), "--question", "Where is it?", "--max_new_tokens", "0"]
    infer([*flags, "--out", "m.png", "--compat", "reference"])
    ((_, logits),) = load_prs_med(checkpoint, compat="reference").segment_batch(
        [Image.open(image)], ["Where is it?"], max_new_tokens=0
    )
    probability = logits.sigmoid()
    stretched = (probability - probability.min()) / (probability.max() - probability.min())
    assert np.array_equal(np.asarray(Image.open("m.png")) > 0, (stretched >= 0.5).numpy())


def test_a_mask_that_cannot_be_written_is_one_line(checkpoint, root):
    Path("file").touch()
    flags = ["--model", checkpoint, "--image", str(root / "lung_CT/test_images/case_0.png"), "--question", "Where?"]
    with pytest.raises(InputError, match=r"file/m.png: cannot be written \((Not a directory|File exists)\)"):
        infer([*flags, "--max_new_tokens", "0", "--out", "file/m.png"])


def test_the_newest_training_run_is_taken(checkpoint, root):
    folder = Path("runs/prs_med_train/20261122-180000")
    folder.mkdir(parents=True)
    (folder / "checkpoint-3").symlink_to(checkpoint)
    image = root / "prostate/test_images/case_1.png"
    Path("runs/prs_med_train/20261122-180000/checkpoint-4").mkdir()
    assert infer(["--image", str(image), "--question", "Where?", "--max_new_tokens", "1"])["area"] >= 0


@pytest.mark.parametrize(
    "recipe, flags, line",
    [
        (
            evaluate,
            ["--data_root", "ROOT"],
            "error: --model is missing: a checkpoint folder (python -m recipes.prs_med_train makes",
        ),
        (evaluate, ["--model", "gone", "--data_root", "ROOT"], "error: --model: gone: no PRS-Med checkpoint there"),
        (evaluate, ["--data_root", "gone"], "error: gone: no such folder"),
        (evaluate, ["--data_root", "ROOT", "--split", "val"], "no rows of the split 'val' (the files have 10 of test)"),
        (evaluate, ["--batch_size", "0"], "error: --batch_size 0: expected a number, at least 1"),
        (evaluate, ["--judge_url", "http://x/v1"], "error: --judge_url and --judge_model belong together"),
        (evaluate, ["--judge_url", "x", "--judge_model", "m"], "error: --judge_url x: expected http://HOST"),
        (infer, ["--question", "Where?"], "error: --image is missing"),
        (infer, ["--image", "IMAGE"], "error: --question is missing"),
        (infer, ["--image", "gone.png", "--question", "Where?"], "error: gone.png: no such image file"),
        (evaluate, ["--data_root", "ROOT", "--mask_values", "red"], "error: --mask_values red: expected values (1 or 1,2)"),
        (infer, ["--image", "IMAGE", "--question", "?", "--out", "IMAGE"], "case_0.png: is the file that --image names"),
        (infer, ["--image", "IMAGE", "--question", "?", "--mask_values", "1,"], "error: --mask_values 1,: expected values"),
        (infer, ["--image", "IMAGE", "--question", "?", "--mask", "OTHER"], "the mask is 50 x 48, the image 50 x 40"),
    ],
)
def test_what_cannot_be_used_is_one_line(recipe, flags, line, root, capsys):
    places = {"ROOT": root, "IMAGE": root / "lung_CT/test_images/case_0.png", "OTHER": root / "lung_CT/test_masks/case_2.png"}
    with pytest.raises(SystemExit) as end:
        run_command(recipe, [str(places.get(flag, flag)) for flag in flags])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and line in err.splitlines()[-1] and "Traceback" not in err
    assert not Path("runs").exists()
