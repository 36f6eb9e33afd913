"""`recipes.medr1_heatmap`: from a folder of evaluations to figures and tables."""

import csv
import json

import pytest

from engine.errors import InputError
from recipes import medr1_heatmap


def test_matrices_and_their_difference_are_written(tmp_path):
    for style, values in {"think": (90, 40, 60), "nothink": (80, 50, 61)}.items():
        for name, accuracy in zip(("CT", "MRI", "OCT"), values, strict=True):
            path = tmp_path / "results" / style / "VQA_CT" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"accuracy": accuracy, "results": []}))
    headline = medr1_heatmap.main(["--runs", str(tmp_path / "results"), "--output_dir", str(tmp_path / "out")])
    assert headline["modality_think"] == {"own": 0.9, "other": 0.5, "cells": 3}
    table = list(csv.DictReader((tmp_path / "out" / "modality_think_minus_nothink.csv").open(newline="")))
    assert table == [{"trained_on": "CT", "CT": "0.1", "MRI": "-0.1", "OCT": "-0.01"}]
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"modality_think.png", "modality_nothink.png", "think_minus_nothink.png"}


def test_without_flags_starter_models_are_taught_and_the_part_they_were_taught_is_their_best(tmp_path, monkeypatch):
    monkeypatch.setattr(medr1_heatmap, "STEPS", 6)
    monkeypatch.setattr(medr1_heatmap, "QUESTIONS", 18)
    monkeypatch.setattr(medr1_heatmap, "STYLES", ("think",))
    headline = medr1_heatmap.main(["--output_dir", str(tmp_path)])
    assert headline["modality_think"]["cells"] == 36
    assert headline["modality_think"]["own"] > 0.7 > 0.4 > headline["modality_think"]["other"]


def test_a_missing_folder_is_one_line_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        medr1_heatmap.main(["--runs", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
