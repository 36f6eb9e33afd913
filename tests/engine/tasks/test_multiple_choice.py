"""Multiple choice: prompts, scores, intervals and how answers are read, by default and as the published scripts do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from engine.evaluation.score import Score
from engine.rollout.answers import Answer
from engine.runs.evaluate import evaluate, write_evaluation
from engine.tasks.evaluation import Evaluation
from engine.tasks.multiple_choice import MultipleChoice
from engine.tasks.published import scoring
from engine.tasks.templates import TEMPLATES

OPTIONS = {"A": "Mammogram", "B": "Positron emission tomography (PET)", "C": "CT", "D": "Fluoroscopy"}
ROOT = Path(__file__).resolve().parents[3]


class Questions:
    """Ten questions in memory; images are grey squares whose shade tells the row."""

    def __init__(self, num_questions: int = 10):
        self.num_questions = num_questions

    def __len__(self):
        return self.num_questions

    def record(self, index: int) -> dict:
        letter = "ABCD"[index % 4]
        return {
            "image_id": f"{(index * 7) % 10}.png",
            "problem": f"Question {index}? " + ", ".join(f"{key}){text}" for key, text in OPTIONS.items()),
            "solution": f"<answer> {letter} </answer>",
            "answer": letter,
            "options": OPTIONS,
            "modality": "CT" if index < 4 else "MRI",
            "question_type": None,
            "row": index,
            "source": "test.json",
        }

    def __getitem__(self, index: int) -> dict:
        return {**self.record(index), "images": [Image.new("RGB", (28, 28), (index,) * 3)]}


TASK = MultipleChoice("medr1_eval_think")


def always_c(rows):
    return [Answer("<think> a scan </think><answer> C </answer>")] * len(rows)


def shade(rows):
    """Answers with the row number, read from the image: shows which answer came to which question."""
    shades = [row["images"][0].getpixel((0, 0))[0] for row in rows]
    return [Answer(f"<answer>{'ABCD'[shade % 4]}</answer> row {shade}") for shade in shades]


def read_answer(text, template, compat):
    return scoring(template, compat).read(text, OPTIONS, template)


def test_answers_return_to_their_questions_whatever_the_batches():
    for batch_size in (1, 3, 64):
        evaluation = evaluate(shade, TASK, Questions(), batch_size=batch_size, progress=False)
        assert [result["model_output"].split()[-1] for result in evaluation.results] == [str(i) for i in range(10)]
        assert evaluation.headline["accuracy"] == 1


def test_the_prompt_is_the_published_one():
    row = Questions(2)[0]
    text = TEMPLATES["medr1_eval_nothink"].replace("{Question}", row["problem"])
    expected = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    assert MultipleChoice("medr1_eval_nothink").prompt(row) == expected


def test_scores_by_group_and_unanswered():
    def answers(rows):
        return [*always_c(rows)[:-1], Answer("I cannot say.")]

    evaluation = evaluate(answers, TASK, Questions(), batch_size=10, progress=False)
    assert evaluation.details["by_modality"] == {"CT": Score(1, 4).as_dict(), "MRI": Score(1, 6).as_dict()}
    assert evaluation.tables["question type"] == {}
    assert evaluation.headline == pytest.approx(
        {"accuracy": 0.2, "low": 0.0567, "high": 0.5098, "num_samples": 10, "unanswered": 0.1}, abs=1e-4
    )


def test_the_interval_is_wilsons():
    score, z = Score(182, 280), 1.959963984540054
    centre = (0.65 + z**2 / 560) / (1 + z**2 / 280)
    half = z / (1 + z**2 / 280) * (0.65 * 0.35 / 280 + z**2 / (4 * 280**2)) ** 0.5
    assert score.interval == pytest.approx((centre - half, centre + half))
    assert Score(0, 5).interval[0] == 0 and Score(5, 5).interval[1] == 1


@pytest.mark.parametrize(
    "text, template, compat, answer",
    [
        ("<answer>(c)</answer>", "medr1_eval_think", "default", "C"),
        ("C", "medr1_eval_think", "default", None),
        ("C", "medr1_zeroshot", "default", "C"),
        (" C) CT\n", "medr1_zeroshot", "default", "C"),
        ("mammogram", "medr1_zeroshot", "default", "A"),
        ("The answer is not here", "medr1_zeroshot", "default", None),
        ("<answer>(c)</answer>", "medr1_eval_think", "reference", None),
        (" C ", "medr1_zeroshot", "reference", " C "),
        ("(c)", "medvlm_eval_simple", "default", "C"),
        ("C", "medvlm_eval_complex", "default", None),
        ("<answer>CT</answer>", "medvlm_eval_complex", "reference", None),
        ("<answer>CT</answer>", "medr1_eval_think", "reference", "CT"),
        ("<answer>(A)</answer><answer> B </answer>", "medvlm_train_complex", "reference", "B"),
        ("<answer>C</answer>", "medvlm_eval_simple", "reference", "<answer>C</answer>"),
    ],
)
def test_an_answer_is_read_by_template_and_compatibility(text, template, compat, answer):
    assert read_answer(text, template, compat) == answer


def test_reference_reading_is_that_of_the_published_scripts(golden):
    cases = json.loads((golden / "grpo" / "reward_golden.json").read_text())["vqa"]
    for case in cases:
        text = case["completion"]
        if isinstance(text, dict):
            before, unit, count, after = text["repeat"]
            text = before + unit * count + after
        think, nothink, zero_shot = (
            read_answer(text, template, "reference") for template in ("medr1_eval_think", "medr1_eval_nothink", "medr1_zeroshot")
        )
        assert think == case["eval_medr1_extract"], text
        assert nothink == case["eval_medr1_nothink25_answer"], text
        assert (zero_shot == "C") == case["eval_medvlm_simple_correct"], text
        assert (read_answer(text, "medvlm_eval_simple", "reference") == "C") == case["eval_medvlm_simple_correct"], text
        assert read_answer(text, "medvlm_eval_complex", "reference") == case["eval_medvlm_complex_extract"], text


def test_the_file_holds_med_r1s_keys_and_ours(tmp_path):
    evaluation = evaluate(always_c, TASK, Questions(), batch_size=4, progress=False)
    write_evaluation(tmp_path, TASK, evaluation, "_before")
    written = json.loads((tmp_path / "evaluation_before.json").read_text())
    read = Evaluation.read(tmp_path / "evaluation_before.json")
    assert (read.results, read.measures, read.tables) == (evaluation.results, evaluation.measures, evaluation.tables)
    assert written["accuracy"] == 20.0 and len(written["results"]) == 10
    row = Questions().record(2)
    assert written["results"][2] == {
        "question": {"image": row["image_id"], "problem": row["problem"], "solution": row["solution"]},
        "ground_truth": "<answer> C </answer>",
        "model_output": "<think> a scan </think><answer> C </answer>",
        "extracted_answer": "C",
        "correct": True,
        "source": "test.json",
        "row": 2,
        "modality": "CT",
        "question_type": None,
    }
    assert written["scores"]["modality"]["MRI"]["num_samples"] == 6
    with Image.open(tmp_path / "accuracy_before.png") as chart:
        assert chart.width > 500


def test_two_processes_share_the_questions_and_agree(tmp_path):
    script = """
import json, os, torch
from tests.engine.tasks.test_multiple_choice import TASK, Questions, evaluate, shade
torch.distributed.init_process_group("gloo")
asked = []
def answers(rows):
    asked.extend(row["image_id"] for row in rows)
    return shade(rows)
evaluation = evaluate(answers, TASK, Questions(), batch_size=2, progress=False)
with open(f"rank{os.environ['RANK']}.json", "w") as file:
    json.dump({"asked": len(asked), "results": evaluation.results}, file)
torch.distributed.destroy_process_group()
"""
    (tmp_path / "both.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "both.py"]
    done = subprocess.run(
        launch, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    alone = evaluate(shade, TASK, Questions(), batch_size=2, progress=False)
    assert (first["asked"], second["asked"]) == (5, 5)
    assert first["results"] == second["results"] == alone.results
