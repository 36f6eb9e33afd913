"""Tables of masks and positions from a function whose outputs are known."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.masked_questions import load_masked_questions
from engine.evaluation.judge import Judge
from engine.evaluation.mask_metrics import mask_levels, score_mask, summarise
from engine.runs.evaluate import evaluate, write_evaluation
from engine.tasks.evaluation import Evaluation
from engine.tasks.masks import MaskAnswers, MaskTask, format_table
from tests.judge_server import says, serve

TASK = MaskTask()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two sets: three images with a lesion in the top left, one in the centre."""
    root = tmp_path_factory.mktemp("root")
    lines = {"lung_CT": [], "prostate": []}
    for i, (name, place) in enumerate(
        [("lung_CT", "top left"), ("lung_CT", "top left"), ("lung_CT", "center"), ("prostate", "top left")]
    ):
        for kind in ("images", "masks"):
            (root / name / f"test_{kind}").mkdir(parents=True, exist_ok=True)
        mask = np.zeros((20, 30), np.uint8)
        mask[:5, :6] = 255
        Image.fromarray(mask).save(root / name / f"test_masks/{i}.png")
        Image.fromarray(np.full((20, 30, 3), 60 + i, np.uint8)).save(root / name / f"test_images/{i}.png")
        lines[name].append(f"{name}/test_masks/{i}.png,{i}.png,Where is {i}?,It is {place}.,in position {place} and so on,test")
    (root / "annotations").mkdir()
    for name, texts in lines.items():
        header = "image_path,image_name,question,answer,position,split"
        (root / f"annotations/{name}.csv").write_text("\n".join([header, *texts]) + "\n")
    return load_masked_questions(root, split="test")


def segment(images, questions):
    """Row 0: a perfect mask and a right answer; row 1: half of it, wrong; row 2: nothing; row 3: all of the image, right."""
    outputs = []
    for image, question in zip(images, questions, strict=True):
        logits = torch.full((image.height, image.width), -30.0)
        i = int(re.search(r"\d", question)[0])
        logits[: (5, 5, 0, 20)[i], : (6, 3, 0, 30)[i]] = 30
        outputs.append((["upper left", "bottom right", "", "top left corner"][i], logits))
    return outputs


@pytest.fixture
def evaluation(rows):
    return evaluate(MaskAnswers(segment), TASK, rows, batch_size=3, progress=False)


def test_processes_share_the_rows_and_each_has_the_whole(evaluation, rows, tmp_path):
    script = """
import json, sys
from engine.data.masked_questions import load_masked_questions
from engine.processes import close, join, rank
from tests.engine.tasks.test_masks import TASK, MaskAnswers, evaluate, segment
join()
asked = []
def counted(images, questions):
    asked.extend(questions)
    return segment(images, questions)
rows = load_masked_questions(sys.argv[1], split="test")
evaluation = evaluate(MaskAnswers(counted), TASK, rows, batch_size=1, progress=False)
with open(f"rank{rank()}.json", "w") as file:
    json.dump({"asked": len(asked), "headline": evaluation.headline, "table": evaluation.summary["table"]}, file)
close()
"""
    (tmp_path / "shared.py").write_text(script)
    root = Path(rows.records[0]["source"]).parents[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone", "shared.py", str(root)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert [one["asked"] for one in told] == [2, 1, 1]
    assert all((one["headline"], one["table"]) == (evaluation.headline, evaluation.summary["table"]) for one in told)


def test_each_set_has_its_line_and_all_rows_have_one(evaluation, rows):
    table = evaluation.summary["table"]
    assert list(table) == ["lung_CT", "prostate", "all"] and [line["num_samples"] for line in table.values()] == [3, 1, 4]
    assert table["lung_CT"]["dice"] == pytest.approx((1 + 2 / 3 + 0) / 3) and table["lung_CT"]["iou"] == pytest.approx(
        (1 + 0.5 + 0) / 3
    )
    assert table["prostate"]["iou"] == pytest.approx(30 / 600)
    expected = summarise(score_mask(_levels(i), np.asarray(row["mask"]) > 0) for i, row in enumerate(rows))
    assert {name: table["all"][name] for name in expected} == pytest.approx(expected)


def _levels(i: int) -> np.ndarray:
    ((_, logits),) = segment([Image.new("L", (30, 20))], [str(i)])
    return mask_levels(torch.sigmoid(logits).numpy())


def test_places_are_counted_against_the_best_constant_answer(evaluation):
    table = evaluation.summary["table"]
    assert table["lung_CT"]["place_accuracy"] == pytest.approx(1 / 3) and table["all"]["place_accuracy"] == 0.5
    assert table["lung_CT"]["majority_accuracy"] == pytest.approx(2 / 3) and table["lung_CT"]["majority"] == "top left"
    assert table["all"]["unread"] == 0.25 and table["all"]["place_low"] < 0.5 < table["all"]["place_high"]
    assert [result["correct"] for result in evaluation.results] == [True, False, False, True]


def test_where_the_position_cannot_be_read_the_mask_says_it(rows):
    unreadable = rows.select([0])
    unreadable.records[0] = unreadable.records[0] | {"position": "somewhere"}
    (result,) = evaluate(MaskAnswers(segment), TASK, unreadable, batch_size=1, progress=False).results
    assert result["true_places"] == ["top left"] and result["correct"]


def test_the_published_code_stretches_an_empty_mask(rows):
    faint = torch.full((20, 30), -8.0)
    faint[0, 0] = -7.9
    plain, stretched = (
        evaluate(MaskAnswers(lambda images, _: [("", faint)] * len(images), own), TASK, rows, batch_size=2, progress=False)
        for own in (False, True)
    )
    assert plain.headline["dice"] == 0 and stretched.headline["dice"] > 0
    levels = mask_levels(faint.sigmoid().numpy()), mask_levels(faint.sigmoid().numpy(), stretched=True)
    assert [mask.max() for mask in levels] == [0, 255]


def test_a_judge_is_asked_about_the_position_column(evaluation):
    with serve(lambda body, _: says("Yes" if "upper left" in body["messages"][0]["content"] else "No")) as server:
        judged = TASK.judged(evaluation, Judge(server.url, "m"))
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert len(asked) == 12 and sum("in position top left and so on" in prompt for prompt in asked) == 9
    assert judged.summary["table"]["lung_CT"]["judge_accuracy"] == pytest.approx(1 / 3)
    assert judged.headline["judge_accuracy"] == 0.25 and "judge_accuracy" not in evaluation.headline
    assert judged.results[0]["judge"] == [True, True, True] and "judge_accuracy" in format_table(judged)


def test_files_hold_the_table_and_every_row(evaluation, tmp_path):
    write_evaluation(tmp_path, TASK, evaluation)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(written["results"]) == 4 and written["table"]["all"]["num_samples"] == 4
    with open(tmp_path / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["dataset"] for line in lines] == ["lung_CT", "prostate", "all"]
    assert float(lines[2]["mDice"]) == evaluation.summary["table"]["all"]["mDice"]
    text = format_table(evaluation).splitlines()
    assert len(text) == 4 and len({len(line) for line in text}) == 1


def test_a_resumed_run_reads_what_it_wrote(evaluation, tmp_path):
    evaluation.write(tmp_path / "evaluation_before.json")
    read = Evaluation.read(tmp_path / "evaluation_before.json")
    kept = ("headline", "measures", "notes", "baselines", "tables", "details", "summary")
    assert all(getattr(read, name) == getattr(evaluation, name) for name in kept)
    assert [result["dice"] for result in read.results] == [result["dice"] for result in evaluation.results]


def test_samples_go_from_the_worst_mask_to_the_best(evaluation, rows):
    samples = TASK.samples(evaluation, rows, MaskAnswers(segment), count=3)
    dice = [sample.answers[0].scores["Dice"] for sample in samples]
    assert dice == sorted(dice) and len(dice) == 3 and (dice[0], dice[-1]) == (0, 1)
    assert samples[-1].question == "Where is 0? (lung_CT)" and samples[-1].solution == "It is top left."
    assert samples[-1].answers[0].right and not samples[0].answers[0].right
