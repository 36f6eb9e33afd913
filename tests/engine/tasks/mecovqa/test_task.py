"""Questions of MeCoVQA from function answers whose scores are known: prompts, measures, tables, samples, rewards."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from engine.data.mecovqa.rows import MeCoVQA, load_mecovqa
from engine.data.splits import readable_prompts
from engine.report.report import write_report
from engine.rollout.answers import Answer
from engine.runs.evaluate import evaluate, write_evaluation
from engine.tasks.evaluation import Evaluation, comparisons, tables
from engine.tasks.mecovqa.task import CaptionTask, MeCoVQATask
from engine.tasks.rewards import RewardFunctions

TASK = MeCoVQATask()
SIZE = (30, 20)
SAID = {
    "Which modality?": "An MRI.",
    "Is it bright?": "No.",
    "What is in [region]?": "a bright spot in the liver",
    "How?": "by CT scan",
}


def item(question: str, answer: str, image: str, **keys) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": f"images/{image}.png", "conversations": turns, **keys}


@pytest.fixture
def rows(tmp_path, monkeypatch) -> MeCoVQA:
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for name in ("ct_00--a--1--x_1", "mr_t1--a--2--x_1"):
        Image.new("RGB", SIZE, (100, 100, 100)).save(tmp_path / "images" / f"{name}.png")
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[:10, :10] = 1
    Image.fromarray(mask).save(tmp_path / "masks" / "m.png")
    Image.fromarray(mask).save(tmp_path / "masks" / "mr_t1--a--2--x_1--0001_000.png")
    (tmp_path / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps({"a": {"liver": "0001"}}))
    ct, mr, drawn = "ct_00--a--1--x_1", "mr_t1--a--2--x_1", "<SEG> <mask>masks/m.png</mask>"
    liver = "<SEG> <mask>masks/mr_t1--a--2--x_1--0001_000.png</mask>"
    items = [
        item("Which modality?", "MRI", mr, answer_type="CLOSED"),
        item("Is it bright?", "yes", ct),
        item("What is in <region>masks/m.png</region>?", "a bright lesion", ct),
        item("How?", "CT", ct),
        item("Segment all of it.", drawn, ct),
        item("Segment it.", liver, mr),
        item("Segment it all, please.", drawn, mr),
    ]
    (tmp_path / "q.json").write_text(json.dumps(items))
    return load_mecovqa(tmp_path / "q.json")


def answers(asked: list[dict]) -> list[Answer]:
    """Words as SAID; masks: all of the image, what is asked for, and no mask at all."""
    found = []
    for row in asked:
        if row["question"] in SAID:
            found.append(Answer(SAID[row["question"]]))
            continue
        full = np.full(SIZE[::-1], 255, np.uint8)
        masks = {"Segment all of it.": (full,), "Segment it.": (np.asarray(row["masks"][0]),)}.get(row["question"], ())
        found.append(Answer("<SEG>" if masks else "I see nothing.", masks=masks))
    return found


def test_the_prompt_has_the_image_first_and_the_region_in_its_place(rows):
    (message,) = TASK.prompt(rows[2])
    image, before, region, after = message["content"]
    assert message["role"] == "user" and image == {"type": "image"}
    assert (before["text"], region["type"], after["text"]) == ("What is in ", "region", "?") and region["mask"].size == SIZE
    assert [part["type"] for part in TASK.prompt(rows[0])[0]["content"]] == ["image", "text"]
    assert TASK.target(rows[4]) == "<SEG>" and TASK.target(rows[2]) == "a bright lesion"


def test_turns_before_come_first_with_the_image(rows):
    said = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "CT"}]
    first, second, third = TASK.prompt(rows[3] | {"history": said})
    assert first["content"] == [{"type": "image"}, {"type": "text", "text": "Which?"}] and second == said[1]
    assert third["content"] == [{"type": "text", "text": "How?"}]


def test_prompts_are_measured_without_opening_a_file(rows):
    class Reader:
        def own_token_in(self, prompt):
            return "<SEG>" if any("all of it" in part.get("text", "") for part in prompt[0]["content"]) else None

        def prompt_length(self, prompt, image_sizes):
            return 5 * len(image_sizes)

    kept = readable_prompts(rows, TASK.prompt, Reader(), "skip", limit=5)
    assert len(kept) == len(rows) - 1 and "its text has <SEG>" in kept.skipped[0]


def test_every_measure_is_that_of_its_rows(rows):
    found = evaluate(answers, TASK, rows, batch_size=3, progress=False)
    headline, dice_full = found.headline, 2 * 100 / 700
    assert headline["num_samples"] == 7 and headline["closed_accuracy"] == 0.5  # "An MRI." has the words of "MRI"
    assert [result["correct"] for result in found.results] == [True, False, False, False, False, True, False]
    assert headline["open_exact"] == 0 and headline["open_recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert headline["open_precision"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert headline["mDice"] == pytest.approx((dice_full + 1 + 0) / 3)
    assert headline["mIoU"] == pytest.approx((1 / 6 + 1 + 0) / 3) and headline["seg_share"] == pytest.approx(2 / 3)
    assert headline["accuracy"] == pytest.approx(2 / 7) and 0 < headline["bleu_1"] < 1 and 0 < headline["rougeL"] < 1
    assert found.baselines == {"closed_majority_accuracy": 1, "full_mask_dice": pytest.approx(dice_full), "empty_mask_dice": 0}
    for name, share in found.measures.items():
        if isinstance(share, dict):
            assert 0 <= share["low"] <= share["accuracy"] <= share["high"] <= 1, name
    line = found.tables["modality"]
    assert list(line) == ["CT", "MR"] and line["MR"]["mDice"]["accuracy"] == pytest.approx(1 / 2)
    assert line["CT"]["mDice"]["num_samples"] == 1 and found.tables["kind"]["grounding"]["closed_accuracy"] is None
    assert list(found.tables["kind"]) == ["complex", "grounding", "region"]
    assert {name: line["mDice"]["accuracy"] for name, line in found.tables["class"].items()} == {"liver": 1}


def test_the_published_rules_are_a_choice(rows):
    found = evaluate(answers, MeCoVQATask("reference"), rows, batch_size=3, progress=False)
    assert list(found.tables["modality"]) == ["ct", "mr"] and found.summary["compat"] == "reference"
    assert found.headline["mDice"] == pytest.approx((2 * (1 / 6) / (1 + 1 / 6) + 1) / 3)


def test_an_evaluation_of_one_kind_has_that_kinds_measures_alone(rows):
    drawn = evaluate(answers, TASK, rows.select([4, 5, 6]), batch_size=3, progress=False)
    assert list(drawn.measures) == ["accuracy", "mDice", "mIoU", "seg_share"]
    closed = evaluate(answers, TASK, rows.select([0, 1]), batch_size=3, progress=False)
    assert list(closed.measures) == ["accuracy", "closed_accuracy"] and list(closed.baselines) == ["closed_majority_accuracy"]


def test_files_and_the_report_hold_it_all(rows, tmp_path):
    found = evaluate(answers, TASK, rows, batch_size=3, progress=False)
    write_evaluation(tmp_path, TASK, found)
    again = Evaluation.read(tmp_path / "evaluation.json")
    assert again.headline == pytest.approx(found.headline) and len(again.results) == 7
    lines = {line["rows"]: line for line in csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))}
    assert list(lines) == ["all", "complex", "grounding", "region", "CT", "MR", "liver"]
    assert float(lines["all"]["mIoU"]) == pytest.approx(found.headline["mIoU"]) and lines["complex"]["mDice"] == ""
    samples = TASK.samples(found, rows, answers)
    assert {sample.question for sample in samples} >= {"What is in [region]?", "Segment it."}
    by_question = {sample.question: np.asarray(sample.image) for sample in samples}
    yellow = (by_question["What is in [region]?"] == (255, 255, 0)).all(-1)
    red = (by_question["Segment it."] == (255, 64, 64)).all(-1)
    assert yellow.any() and red.any() and not (by_question["Is it bright?"] != 100).any()
    write_report(
        tmp_path / "report.html",
        title="t",
        headline=found.headline,
        settings={},
        rows=[],
        comparisons=comparisons({"before": found, "after": found}),
        tables=tables({"before": found, "after": found}),
        samples=samples,
        legend=TASK.legend,
        skipped=[],
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "mDice" in page and "closed" in page and "What is in [region]?" in page


def test_words_are_rewarded_and_masks_left_to_others(rows):
    columns = [rows[i] | {"prompt": TASK.prompt(rows[i])} for i in (1, 1, 2, 4)]
    texts = ["Yes, it is.", "no", "bright lesion", "<SEG>"]
    found = RewardFunctions(TASK.rewards)(columns, texts, [[1]] * 4, step=0, state=None)
    assert found[:3, 0].tolist() == [1, 0, 1] and found[3, 0].isnan()


def test_a_caption_is_learned_from_its_image_alone(rows):
    row = rows[0] | {
        "answer": "An MRI image.",
        "question_parts": [],
        "question": "",
        "kind": "caption",
        "answer_type": None,
        "masks": [],
    }
    task = CaptionTask()
    assert task.prompt(row) == [{"role": "caption", "content": [{"type": "image"}]}] and task.target(row) == "An MRI image."
