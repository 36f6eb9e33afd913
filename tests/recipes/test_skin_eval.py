"""Evaluation of skin answers: measures with intervals, a confusion matrix and boxes drawn, on drawn lesions and photographs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from engine.data.prepare.ham10000 import SkinPreparation, prepare_skin
from engine.errors import InputError
from recipes.skin_eval import main

HAM = Path("../shared/data/mini/ham10000_mini").resolve()
SHARES = ("diagnosis_accuracy", "balanced_accuracy", "region_accuracy", "mean_iou", "iou_over_50")


def test_the_starter_policy_finds_lesions_and_calls_them_wrongly(tmp_path):
    headline = main(["--limit", "40", "--output_dir", str(tmp_path)])
    assert set(SHARES) | {"num_samples", "unanswered", "output", "recall", "low", "high"} == set(headline)
    assert headline["num_samples"] == 40 and headline["unanswered"] == 0
    assert all(headline["low"][name] <= headline[name] <= headline["high"][name] for name in SHARES)
    assert headline["mean_iou"] > 0.45 and headline["region_accuracy"] > 0.8 and headline["diagnosis_accuracy"] < 0.45

    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(written["results"]) == 40 and written["confusion"]["labels"][-1] == "none"
    assert sum(map(sum, written["confusion"]["rows"])) == 40
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width > 500
    report = (tmp_path / "report.html").read_text()
    assert "Red is the predicted box" in report and "melanocytic nevus" in report


def test_real_photographs_in_every_question(tmp_path):
    if not HAM.is_dir():
        pytest.skip(f"{HAM} is not here")
    prepare_skin(SkinPreparation(metadata=str(HAM / "HAM10000_metadata.csv"), output=str(tmp_path / "data")))
    for question in ("diagnosis", "tagged"):
        flags = [
            "--data",
            str(tmp_path / "data"),
            "--split",
            "train",
            "--question",
            question,
            "--limit",
            "4",
            "--max_pixels",
            "12544",
        ]
        headline = main([*flags, "--output_dir", str(tmp_path / question)])
        assert headline["num_samples"] == 4 and ("mean_iou" in headline) == (question == "tagged")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--model", "./nowhere"], "--model: "),
        (["--iou", "mask", "--sam_model", "sam_vit_b"], "--sam_ckpt is missing: the published weights of sam_vit_b"),
        (["--question", "all"], "invalid choice: 'all'"),
    ],
)
def test_mistakes_are_one_line(flags, words):
    with pytest.raises(InputError) as refused:
        main(flags)
    assert words in str(refused.value) and "\n" not in str(refused.value)
