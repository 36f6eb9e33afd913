"""The report is one page of plain values: before and after, tables, answers marked right or wrong. It shows a model's text without
obeying it, and loads nothing."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from engine.report.content import Comparison, Sample, ShownAnswer, Table
from engine.report.report import write_curves, write_report
from tests.engine.report.page import Element, read_page

EVIL = "<think>x</think><script>alert(1)</script><img src=http://evil.example/x.png>{{ 7 * 7 }}<answer> C </answer>"
PICTURE = Image.fromarray(np.zeros((600, 900), np.uint8))


def share(num_correct: int, num_samples: int = 10) -> dict:
    accuracy = num_correct / num_samples
    ends = {"low": max(0.0, accuracy - 0.2), "high": min(1.0, accuracy + 0.15)}
    return {"accuracy": accuracy, **ends, "num_correct": num_correct, "num_samples": num_samples}


ACCURACY = Comparison(
    "accuracy",
    {"before training": share(4), "after training": share(7)},
    notes={"before training": "10.0 % without an answer"},
    fixed=4,
    broken=1,
)
DICE = Comparison("dice", {"before training": 0.11237, "after training": 0.81789})


def metrics(steps: int) -> list[dict]:
    kl = [None if step == 2 else 0.01 * step for step in range(1, steps + 1)]
    return [{"step": i + 1, "reward": 1 + i / steps, "rewards/<b>/mean": 0.5, "kl": value} for i, value in enumerate(kl)]


def sample(*answers: ShownAnswer, **changes) -> Sample:
    parts = {"image": PICTURE, "question": "What is <it>? A)MRI, C)CT", "solution": "C) <u>CT</u>", "step": 7} | changes
    return Sample(answers=list(answers), **parts)


RIGHT = ShownAnswer(EVIL, {"accuracy": 1.0, "format": None}, right=True, advantage=1.25)
WRONG = ShownAnswer("", {"accuracy": 0.0, "format": 0.5}, right=False, advantage=-0.5)
UNKNOWN = ShownAnswer("CT", {"accuracy": 0.0, "format": 1.0})


def write(path, **changes) -> Element:
    parts = {
        "title": "A <run>",
        "headline": {"reward_last": 1.46875, "seconds": 187.0, "checkpoint": "runs/a/checkpoint-3", "skipped": None},
        "settings": {"data": {"dataset_name": "<script>"}, "training": {"beta": 0.04}},
        "rows": metrics(20),
        "comparisons": [ACCURACY],
        "tables": [Table("accuracy by modality", ["before training", "after training"], {"CT <b>": [share(4), share(7)]})],
        "samples": [sample(RIGHT, WRONG, UNKNOWN)],
        "legend": "Red is <predicted>.",
        "skipped": ["train.json: row 3: <gone>"],
    }
    write_report(path / "report.html", **(parts | changes))
    return read_page(path / "report.html")


def style_of(element: Element) -> dict[str, float]:
    """{"left": 40.0}: the lengths in its style attribute, all in percent."""
    return {name: float(value) for name, value in re.findall(r"([\w-]+): ([\d.]+)%", element.attributes["style"])}


def test_a_models_text_is_shown_and_not_obeyed(tmp_path):
    page = write(tmp_path)
    tags = {element.tag for element in page.walk()}
    assert not tags & {"script", "it", "gone", "run", "u", "predicted"}
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert [pre.text for pre in page.all("pre")[1:]] == ["(empty)", "CT"]
    assert [tag.text for tag in page.all(".tag")] == ["<think>", "</think>", "<answer>", "</answer>"]
    for shown in ["A <run>", "What is <it>?", "C) <u>CT</u>", "CT <b>", "Red is <predicted>.", "train.json: row 3: <gone>"]:
        assert shown in page.text
    assert not [name for element in page.walk() for name in element.attributes if name.startswith("on")]


def test_the_page_holds_all_it_shows(tmp_path):
    page = write(tmp_path)
    links = [
        value
        for element in page.walk()
        for name, value in element.attributes.items()
        if name in ("src", "srcset", "href", "xlink:href", "data", "action")
    ]
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert [image.attributes["src"][:23] for image in page.all("img")] == ["data:image/jpeg;base64,"]
    assert not {element.tag for element in page.walk()} & {"link", "script", "iframe", "object", "embed", "base"}
    assert not re.search(r"url\((?!#)|@import", (tmp_path / "report.html").read_text())


def test_a_right_answer_is_marked_right_and_a_wrong_one_wrong(tmp_path):
    answers = write(tmp_path).all(".answer")
    assert [answer.classes & {"right", "wrong"} for answer in answers] == [{"right"}, {"wrong"}, set()]
    assert answers[0].one("strong").text == "✓ right" and answers[1].one("strong").text == "✗ wrong"
    assert not answers[2].all("strong")


def test_no_tick_stands_at_the_true_answer_of_a_wrong_one(tmp_path):
    page = write(tmp_path, samples=[sample(WRONG)], comparisons=[])
    assert page.one(".label").text == "true answer step 7" and page.one(".truth").text == "C) <u>CT</u>"
    assert "✓" not in page.text and page.text.count("✗") == 1


def test_an_answer_has_its_scores_and_a_bar_of_their_sum(tmp_path):
    answers = write(tmp_path).all(".answer")
    assert [answer.one(".scores").text for answer in answers] == [
        "accuracy 1 format – total 1",
        "accuracy 0 format 0.5 total 0.5",
        "accuracy 0 format 1",
    ]
    assert [style_of(answer)["--level"] for answer in answers] == [100, 0, 100]
    assert [answer.one(".advantage").text for answer in answers[:2]] == ["advantage +1.25", "advantage -0.50"]
    assert [style_of(answer.one(".balance").one("i")) for answer in answers[:2]] == [
        {"left": 50, "width": 50},
        {"left": 30, "width": 20},
    ]
    assert not answers[2].all(".advantage")


def test_answers_under_several_conditions_have_their_names(tmp_path):
    answers = [ShownAnswer("CT", {}, right=True, name="clean"), ShownAnswer("MRI", {}, right=False, name="pgd")]
    page = write(tmp_path, samples=[sample(*answers, step=None, image=None)])
    assert [answer.one(".marks").text for answer in page.all(".answer")] == ["✓ right clean", "✗ wrong pgd"]
    assert not page.all("img") and page.one(".label").text == "true answer"


def test_before_and_after_of_two_measures(tmp_path):
    page = write(tmp_path, comparisons=[DICE, ACCURACY])
    dice, accuracy = page.all(".measure")
    assert dice.one("h2").text == "Dice" and accuracy.one("h2").text == "Accuracy"
    assert [point.text for point in dice.all(".point")] == ["before training 0.112", "after training 0.818"]
    assert [point.text for point in accuracy.all(".point")] == [
        "before training 40.0 % 95 % interval 20.0–55.0 10.0 % without an answer",
        "after training 70.0 % 95 % interval 50.0–85.0",
    ]
    assert dice.one(".gain").text == "+0.706"
    assert accuracy.one(".gain").text == "+30.0 points 4 questions newly right, 1 newly wrong 10 questions"
    assert all("up" in measure.one("strong").classes and len(measure.all(".arrow")) == 1 for measure in (dice, accuracy))


def test_an_evaluation_has_no_arrow_and_attacks_have_three_values(tmp_path):
    (once,) = write(tmp_path, comparisons=[Comparison("accuracy", {"of a model": share(5)})]).all(".measure")
    assert not once.all(".arrow") and not once.all(".gain")
    assert once.one(".point").text == "of a model 50.0 % 95 % interval 30.0–65.0 10 questions"
    values = {"clean": share(5), "fgsm": share(9), "pgd": share(2)}
    (attacked,) = write(tmp_path, comparisons=[Comparison("accuracy", values, fixed=0, broken=3)]).all(".measure")
    assert [value.text for value in attacked.all(".value")] == ["50.0 %", "90.0 %", "20.0 %"] and len(attacked.all(".arrow")) == 2
    assert attacked.one("strong").text == "−30.0 points" and "down" in attacked.one("strong").classes


def test_tiles_show_what_no_comparison_does(tmp_path):
    told = {"accuracy_before": 0.4, "accuracy": 0.7, "low": share(7)["low"], "num_samples": 10}
    untold = {
        "majority_accuracy": 0.4,
        "reward_last": 1.46875,
        "loss_last": 0.05518,
        "seconds": 187.0,
        "checkpoint": "a/b",
        "x": None,
    }
    page = write(tmp_path, headline=told | untold, comparisons=[ACCURACY])
    assert [tile.text for tile in page.all(".tile")] == [
        "Majority accuracy 40.0 %",
        "Reward last 1.469",
        "Loss last 0.0552",
        "Time 3.1 min",
        "Checkpoint a/b",
    ]


def test_a_table_of_shares_draws_intervals_on_one_axis(tmp_path):
    lines = {"CT": [share(4), share(7)], "MRI": [None, share(9, 12)]}
    page = write(tmp_path, tables=[Table("accuracy by question_type", ["before training", "of runs/a_b"], lines)], rows=[])
    table = page.one("table")
    assert [heading.text for heading in page.all("h2")][1] == "Accuracy by question type"
    assert table.one("thead").text == "questions 0 % 25 50 75 100 before training of runs/a_b"
    first, second = table.one("tbody").all("tr")
    assert first.one(".count").text == "10" and second.one(".count").text == "12"
    assert [cell.text for cell in first.all("td")[2:]] == ["40.0 % (20–55)", "70.0 % (50–85)"]
    assert [cell.text for cell in second.all("td")[2:]] == ["–", "75.0 % (55–90)"]
    before, after = first.all(".track")
    assert style_of(before.one("b")) == {"left": 40} and style_of(before.one("i")) == {"left": 20, "width": 35}
    assert style_of(after.one("b")) == {"left": 70} and [style_of(track)["--mark"] for track in (before, after)] == [0, 100]
    assert [bool(track.all("b")) for track in second.all(".track")] == [False, True]


def test_a_table_of_numbers_writes_a_columns_numbers_alike(tmp_path):
    columns = ["num_samples", "mDice", "place_accuracy", "pixels", "worst"]
    lines = {"lung_CT": [1234, 0.5, 0.25, 12.34, "left"], "all": [7, np.float32(0.0625), 1.0, 130.0, None]}
    page = write(tmp_path, tables=[Table("measures by data set", columns, lines)])
    head, *rows = page.one("table").all("tr")
    assert [cell.text for cell in head.all("th")] == ["", "samples", "mDice", "place accuracy", "pixels", "worst"]
    assert [[cell.text for cell in row.all("td")] for row in rows] == [
        ["1 234", "0.500", "25.0 %", "12.3", "left"],
        ["7", "0.062", "100.0 %", "130.0", "–"],
    ]
    assert [row.one("th").text for row in rows] == ["lung_CT", "all"]
    assert ["n" in cell.classes for cell in rows[0].all("td")] == [True, True, True, True, False] and not page.all(".track")


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [], "samples": [], "comparisons": [], "tables": [], "skipped": (), "settings": {}, "headline": {}},
        {"rows": metrics(1), "samples": [sample(ShownAnswer("a", {}), step=None)], "legend": ""},
        {"comparisons": [Comparison("accuracy", {"of the model": share(0)})], "settings": {"seed": 1}},
        {"comparisons": [Comparison("dice", {"before training": None, "after training": 0.5})]},
        {"tables": [Table("empty", ["a"], {})], "headline": {"loss": float("nan"), "flag": True}},
    ],
)
def test_a_run_without_some_part_has_a_page_without_it(tmp_path, changes):
    page = write(tmp_path, **changes)
    assert page.one("h1").text == "A <run>"


def test_settings_are_listed_and_those_that_matter_come_first(tmp_path):
    page = write(tmp_path)
    glance, *groups = page.all(".settings")
    assert glance.text == "dataset_name <script> beta 0.04" and [group.text for group in groups] == [
        "dataset_name <script>",
        "beta 0.04",
    ]


@pytest.mark.parametrize("module", ["engine.report.charts", "engine.report.samples", "engine.report.overlay"])
def test_drawing_libraries_are_imported_when_something_is_drawn(module):
    code = f"import sys, {module}; sys.exit(str({{'matplotlib', 'jinja2', 'torch', 'transformers'}} & set(sys.modules) or 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "0"


def test_what_cannot_be_drawn_costs_itself_alone(tmp_path, caplog, monkeypatch):
    """A page and a picture that fail are a line each; what is written beside them stays."""
    monkeypatch.setattr("engine.report.report.as_png", lambda figure: 1 / 0)
    write_curves(tmp_path / "curves.png", [{"step": 1, "reward": 1.0}])
    write_report(tmp_path / "report.html", title="t", headline={}, settings={}, rows=[], samples=[None])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].endswith("curves.png: cannot be made (ZeroDivisionError: division by zero)")
    assert len(lines) == 2 and "report.html: cannot be made (AttributeError" in lines[1]
    assert not list(tmp_path.iterdir())
