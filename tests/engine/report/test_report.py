"""The report is one page that shows a model's text without obeying it; the curves show what was logged."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from engine.evaluation.questions import Evaluation
from engine.report.charts import as_svg, curves_figure
from engine.report.report import evaluation_samples, write_curves, write_report

EVIL = "<think>x</think><script>alert(1)</script><img src=http://evil.example/x.png>{{ 7 * 7 }}<answer> C </answer>"


class Page(HTMLParser):
    """Elements with their attributes, and the text; tags must nest."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def evaluation(num_correct: int) -> Evaluation:
    results = [
        {"correct": i < num_correct, "extracted_answer": "C", "modality": "CT <b>" if i % 2 else "MRI", "question_type": None}
        for i in range(10)
    ]
    return Evaluation(results, "medr1_eval_think", "default")


def metrics(steps: int) -> list[dict]:
    return [
        {
            "step": step,
            "reward": 1.0 + step / steps,
            "rewards/<b>/mean": 0.5,
            "kl": None if step == 2 else 0.01 * step,
            "seconds/train": 0.5,
        }
        for step in range(1, steps + 1)
    ]


def sample(**changes) -> dict:
    completions = [
        {"text": EVIL, "rewards": {"accuracy": 1.0, "format": None}, "advantage": 1.25},
        {"text": "", "rewards": {"accuracy": 0.0, "format": 0.0}, "advantage": -0.5},
    ]
    image = Image.fromarray(np.zeros((600, 900), np.uint8))
    question = "What is <it>? A)MRI, C)not this, B)PET, C)CT"
    return {
        "image": image,
        "step": 7,
        "question": question,
        "solution": "<answer> C </answer>",
        "completions": completions,
    } | changes


def write(path, **changes) -> tuple[str, Page]:
    parts = {
        "title": "A <run>",
        "headline": {
            "accuracy_after": 0.7,
            "reward_last": 1.5,
            "seconds": 187.0,
            "checkpoint": "runs/a/checkpoint-3",
            "skipped": None,
        },
        "settings": {"data": {"dataset_name": "<script>"}, "training": {"beta": 0.04}},
        "rows": metrics(20),
        "samples": [sample()],
        "evaluations": {"before training": evaluation(4), "after training": evaluation(7)},
        "skipped": ["train.json: row 3: <gone>"],
    }
    write_report(path, **(parts | changes))
    html = path.read_text()
    return html, Page(html)


def test_a_models_text_is_shown_and_not_obeyed(tmp_path):
    html, page = write(tmp_path / "report.html")
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags and "it" not in tags and "gone" not in tags
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text and "(empty)" in page.text
    assert [attributes["src"][:23] for tag, attributes in page.elements if tag == "img"] == ["data:image/jpeg;base64,"]


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    html, page = write(tmp_path / "report.html")
    links = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href", "xlink:href")
    ]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\((?!#)|@import|<link", html)


def test_the_page_holds_the_numbers_of_the_run(tmp_path):
    _, page = write(tmp_path / "report.html")
    text = " ".join(page.text.split())
    for shown in [
        "40.0 %",
        "70.0 %",
        "+30.0 points",
        "3 questions newly right, 0 newly wrong",
        "95 % interval 39.7–89.2",
        "3.1 min",
    ]:
        assert shown in text
    for shown in ["C) CT", "step 7", "advantage +1.25", "accuracy 1 format –", "train.json: row 3: <gone>", "beta 0.04", "CT <b>"]:
        assert shown in text


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [], "samples": [], "evaluations": None, "skipped": (), "settings": {}, "headline": {}},
        {"rows": metrics(1), "samples": [sample(step=None, completions=[{"text": "a", "rewards": {}, "advantage": None}])]},
        {"evaluations": {"of the model": evaluation(0)}, "settings": {"seed": 1}},
    ],
)
def test_a_run_without_some_part_has_a_page_without_it(tmp_path, changes):
    _, page = write(tmp_path / "report.html", **changes)
    assert page.text.strip().startswith("A <run>")


def test_samples_of_an_evaluation_are_two_wrong_for_one_right_spread_over_the_set():
    picture = Image.new("RGB", (8, 8))
    questions = [{"images": [picture], "problem": str(i), "solution": "C"} for i in range(30)]
    results = [{"correct": i % 2 == 0, "model_output": f"text {i}"} for i in range(30)]
    samples = evaluation_samples(Evaluation(results, "medr1_eval_think", "default"), questions, count=6)
    assert [sample["question"] for sample in samples] == ["1", "7", "15", "23", "0", "14"]
    assert samples[0]["completions"] == [{"text": "text 1", "rewards": {"correct": 0.0}, "advantage": None}]
    few_wrong = Evaluation([{"correct": i > 0, "model_output": ""} for i in range(30)], "medr1_eval_think", "default")
    assert len(evaluation_samples(few_wrong, questions, count=6)) == 6


def test_curves_show_only_what_was_logged(tmp_path):
    figure = curves_figure(metrics(20))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Reward", "KL to the reference", "Time"]
    steps, values = figure.axes[1].lines[0].get_data()
    assert steps.tolist() == [1, *range(3, 21)] and values[1] == 0.03
    write_curves(tmp_path / "curves.png", metrics(20))
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_the_thick_line_is_a_mean_over_a_tenth_of_the_run():
    rows = [{"step": i, "reward": float(i % 2)} for i in range(40)]
    raw, smooth = curves_figure(rows).axes[0].lines
    assert raw.get_ydata().tolist() == [float(i % 2) for i in range(40)]
    expected = [np.mean([j % 2 for j in range(max(0, i - 2), min(40, i + 3))]) for i in range(40)]
    np.testing.assert_allclose(smooth.get_ydata(), expected, atol=1e-12)


def test_a_pages_curves_take_the_colour_of_its_text():
    svg = as_svg(curves_figure(metrics(5)))
    assert svg.startswith("<svg") and "currentColor" in svg and "#1f2933" not in svg and "&lt;b&gt;" in svg
