"""One run for every task and trainer: lesions, which no recipe trains yet, go through it as questions and masks do."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from engine.data.lesions import DIAGNOSES, load_skin
from engine.data.splits import Splits
from engine.report.content import value_of
from engine.rollout.answers import Answer
from engine.runs.evaluate import evaluate
from engine.runs.train import first_and_last, train
from engine.tasks.evaluation import comparisons
from engine.tasks.skin.task import LesionTask
from engine.training.config.grpo import GRPOConfig
from engine.training.config.sft import SFTConfig
from engine.training.grpo import GRPOTrainer
from engine.training.sft import SFTTrainer
from models.loading import load_policy
from tests.tiny_qwen import save_tiny

SETTINGS = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_completion_length": 8}
SETTINGS |= {"save_strategy": "no", "report_to": "none", "use_cpu": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """Seven lesions, one of each diagnosis; the last has no box, so it is asked for its diagnosis alone."""
    root = tmp_path_factory.mktemp("skin")
    rows = []
    for i, dx in enumerate(DIAGNOSES):
        Image.fromarray(np.full((45, 60, 3), 20 * i, np.uint8)).save(root / f"ISIC_{i}.jpg")
        rows.append({"image_id": f"ISIC_{i}", "dx": dx, "localization": "scalp", "bbox": [2, 3, 12, 9] if i < 6 else None})
    (root / "train.json").write_text(json.dumps(rows))
    return load_skin(root / "train.json", question="box")


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (SFTTrainer, SFTConfig)])
def test_lesions_are_trained_and_evaluated_like_any_task(model, lesions, tmp_path, monkeypatch, trainer, config):
    args = config(output_dir=str(tmp_path), **SETTINGS)
    task, splits = LesionTask(), Splits(lesions, lesions.select([0, 6]))
    headline = train("skin", "Skin", trainer, partial(load_policy, model), task, splits, args, {"training": args})
    measured = {f"{name}_{when}" for name in ("diagnosis_accuracy", "region_accuracy", "mean_iou") for when in ("before", "after")}
    measured |= {"majority_accuracy", "seconds"}
    assert measured | {f"{trainer.headline_metric}_first", "checkpoint"} <= set(headline)
    for name in ("config.json", "metrics.jsonl", "evaluation_before.json", "evaluation_after.json", "curves.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 100
    results = json.loads((tmp_path / "evaluation_after.json").read_text())["results"]
    assert [result["iou"] is None for result in results] == [False, True]


def test_what_was_known_before_training_is_of_the_same_rows(model, lesions, tmp_path, caplog):
    """A resumed run takes it from the folder, where it is of its held-out rows: not of others, whatever its checkpoint says."""

    def evaluated_before(rows, resume=None):
        """How many rows were asked about before training, and how many evaluation_before.json is of."""
        args = SFTConfig(
            output_dir=str(tmp_path), **SETTINGS | {"save_strategy": "steps", "save_steps": 1}, resume_from_checkpoint=resume
        )
        caplog.clear()
        with caplog.at_level("INFO"):
            splits = Splits(lesions, lesions.select(rows))
            headline = train(
                "skin", "Skin", SFTTrainer, partial(load_policy, model), LesionTask(), splits, args, {"training": args}
            )
        told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("before training: ")]
        written = json.loads((tmp_path / "evaluation_before.json").read_text())
        for name, cell in written["shown"]["measures"].items():
            assert headline[f"{name}_before"] == value_of(cell)
        return [int(line.split(", ")[-1].split()[0]) for line in told], len(written["results"])

    first = str(tmp_path / "checkpoint-1")
    assert evaluated_before([0, 6]) == ([2], 2)
    assert evaluated_before([0, 6], first) == ([], 2)  # known
    assert evaluated_before([0, 1, 2], first) == ([3], 3)
    assert evaluated_before([0, 6], first) == ([2], 2)  # though the checkpoint is of a run that knew these
    (tmp_path / "evaluation_before.json").write_text('{"results": []}')
    assert evaluated_before([0, 6], first) == ([2], 2)


def test_lesion_answers_are_scored_by_what_is_asked(lesions):
    def answers(rows):
        return [
            Answer(row["solution"].replace("[2, 3, 12, 9]", "[2, 3, 12, 6]") if row["row"] else "I see nothing.") for row in rows
        ]

    evaluation = evaluate(answers, LesionTask(), lesions, batch_size=3, progress=False)
    assert [result["correct"] for result in evaluation.results] == [False, *[True] * 6]
    assert [result["region_correct"] for result in evaluation.results] == [False, *[True] * 5, None]
    assert [result["iou"] for result in evaluation.results] == [0, *[pytest.approx(0.5)] * 5, None]
    assert evaluation.headline["diagnosis_accuracy"] == 6 / 7 and evaluation.headline["region_accuracy"] == 5 / 6
    assert evaluation.headline["mean_iou"] == pytest.approx(2.5 / 6) and evaluation.headline["unanswered"] == 1 / 7
    assert evaluation.tables["diagnosis"]["melanoma"]["recall"]["accuracy"] == 1
    samples = LesionTask().samples(evaluation, lesions, answers)
    assert [sample.answers[0].right for sample in samples].count(False) == 1 and len(samples) == 7


def test_what_became_right_is_said_of_the_measure_that_counts_it(lesions):
    """The diagnoses of the same answers change from all wrong to all right; of the regions nothing is known row by row."""
    before, after = (
        evaluate(
            lambda rows, own=text: [Answer(own or row["solution"]) for row in rows],
            LesionTask(),
            lesions,
            batch_size=4,
            progress=False,
        )
        for text in ("I see nothing.", None)
    )
    compared = {one.name: one for one in comparisons({"before": before, "after": after})}
    assert (compared["diagnosis_accuracy"].fixed, compared["diagnosis_accuracy"].broken) == (7, 0)
    assert compared["region_accuracy"].fixed is None and compared["mean_iou"].broken is None


def test_first_and_last_are_means_of_a_tenth():
    rows = [{"reward": float(i)} for i in range(20)] + [{"other": 1.0}]
    assert first_and_last("reward", rows) == {"reward_first": 0.5, "reward_last": 18.5}
    assert first_and_last("loss", rows) == {"loss_first": None, "loss_last": None}
