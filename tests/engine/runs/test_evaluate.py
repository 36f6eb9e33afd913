"""Results are written and told before anything that may fail is drawn."""

import json

from engine.data.starter.questions import build_starter_data
from engine.tasks.multiple_choice import MultipleChoice
from recipes.medr1_eval import main

FLAGS = ["--limit", "4", "--max_new_tokens", "24", "--output_dir"]


def test_a_picture_and_a_page_that_fail_lose_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(MultipleChoice, "files", lambda self, evaluation: 1 / 0)
    monkeypatch.setattr(MultipleChoice, "samples", lambda self, *of: [][0])
    headline = main([*FLAGS, str(tmp_path)])
    assert headline["num_samples"] == len(json.loads((tmp_path / "evaluation.json").read_text())["results"]) == 4
    told = [record.getMessage() for record in caplog.records if "cannot be made" in record.getMessage()]
    assert len(told) == 2 and "ZeroDivisionError" in told[0] and "report.html: cannot be made (IndexError" in told[1]


def test_labels_that_look_like_formulas_are_labels(tmp_path, caplog):
    starter = build_starter_data()
    rows = json.loads((starter / "test.json").read_text())[:4]
    names = ["a $\\frac{$", "$5 and $6", "<b>x</b>", "=1+1"]
    (tmp_path / "q.json").write_text(json.dumps([row | {"modality": name} for row, name in zip(rows, names, strict=True)]))
    headline = main(["--data", str(tmp_path / "q.json"), "--image_root", str(starter), *FLAGS, str(tmp_path / "run")])
    assert set(headline["by_modality"]) == set(names) and "cannot be made" not in caplog.text
    assert (tmp_path / "run" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "a $\\frac{$" in page and "<b>x</b>" not in page
