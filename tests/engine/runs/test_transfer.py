"""Matrices of what was trained on and tested on, from every kind of evaluation file."""

import json
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.runs.transfer import read_matrices


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def published(accuracy) -> dict:
    return {"accuracy": accuracy, "results": []}


def ours(template: str, **groups) -> dict:
    scores = {kind: {name: {"accuracy": value} for name, value in shares.items()} for kind, shares in groups.items()}
    return {"accuracy": 50.0, "template": template, "scores": scores, "results": []}


def summary(**accuracies) -> dict:
    return {
        "results": [{"name": name, "attacks": {"clean": {"accuracy": a}, "pgd": {"accuracy": 0}}} for name, a in accuracies.items()]
    }


def cells(root: Path) -> dict:
    return {(matrix.kind, matrix.style): matrix.cells for matrix in read_matrices(root)}


def test_files_of_every_origin_become_one_matrix(tmp_path):
    write(tmp_path / "VQA_CT" / "CT(Computed Tomography)_test.json", published(80))
    write(tmp_path / "VQA_CT" / "MR (Mag-netic Resonance Imaging)_test.json", published(25.5))
    write(tmp_path / "VQA_CT" / "notes.json", {"any": "thing"})
    write(tmp_path / "mri" / "evaluation.json", ours("medr1_eval_think", modality={"CT": 0.5, "MRI": 1.0, "unknown": 0.1}))
    write(tmp_path / "US" / "evaluation_summary.json", summary(CT=10, ultrasound=90))
    write(tmp_path / "US" / "modality" / "CT" / "evaluation_clean.json", ours("medr1_eval_think", modality={"CT": 0.1}))
    assert cells(tmp_path) == {
        ("modality", "think"): {
            ("CT", "CT"): 0.8,
            ("CT", "MRI"): 0.255,
            ("MRI", "CT"): 0.5,
            ("MRI", "MRI"): 1.0,
            ("Ultrasound", "CT"): 0.1,
            ("Ultrasound", "Ultrasound"): 0.9,
        }
    }
    (matrix,) = read_matrices(tmp_path)
    assert matrix.trained == ["CT", "MRI", "Ultrasound"] == matrix.tested  # the published order
    assert matrix.mean(own=True) == pytest.approx(0.9) and matrix.mean(own=False) == pytest.approx((0.255 + 0.5 + 0.1) / 3)


def test_tasks_and_modalities_are_kept_apart_and_a_folder_or_a_template_says_the_style(tmp_path):
    both = {"modality": {"CT": 0.9}, "question_type": {"Lesion Grading": 0.7}}
    write(tmp_path / "think" / "CT" / "evaluation.json", ours("medr1_eval_think", **both))
    write(tmp_path / "no-think" / "CT" / "evaluation.json", ours("medr1_eval_think", **both))
    write(tmp_path / "Lesion_Grading" / "run 2" / "evaluation_after.json", ours("medr1_train_nothink", **both))
    found = cells(tmp_path)
    assert found == {
        ("modality", "think"): {("CT", "CT"): 0.9},
        ("modality", "nothink"): {("CT", "CT"): 0.9},
        ("question_type", "nothink"): {("Lesion Grading", "Lesion Grading"): 0.7},
    }


def test_a_difference_has_the_cells_of_both(tmp_path):
    write(tmp_path / "think" / "CT" / "evaluation_summary.json", summary(CT=80, MRI=40))
    write(tmp_path / "nothink" / "CT" / "evaluation_summary.json", summary(CT=85))
    think, nothink = read_matrices(tmp_path)
    difference = think.minus(nothink)
    assert difference.cells == {("CT", "CT"): pytest.approx(-0.05)}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "expected an evaluation"),
        ({"accuracy": 3}, "no list 'results'"),
        (published("80 %"), "an accuracy of '80 %' (expected a number of percent"),
        (published(101), "an accuracy of 101"),
        (published(True), "an accuracy of True"),
        ('{"accuracy": NaN, "results": []}', "an accuracy of nan"),
        ('{"accuracy": 3, "accuracy": 4, "results": []}', "cannot be read as JSON ('accuracy' is given twice"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_no_evaluation_is_one_line_that_names_it(tmp_path, content, line):
    write(tmp_path / "CT" / "MRI.json", content)
    with pytest.raises(InputError) as error:
        read_matrices(tmp_path)
    assert line in str(error.value) and "MRI.json" in str(error.value) and "\n" not in str(error.value)


def test_two_files_of_one_cell_are_refused_and_so_is_a_folder_without_any(tmp_path):
    write(tmp_path / "old" / "CT" / "MRI.json", published(1))
    write(tmp_path / "new" / "VQA_CT" / "MRI_test.json", published(2))
    with pytest.raises(InputError, match=r"old/CT/MRI.json: MRI .* trained on CT stands in .*new/VQA_CT/MRI_test.json too"):
        read_matrices(tmp_path)
    for folder in (tmp_path / "missing", tmp_path / "old" / "CT"):
        with pytest.raises(InputError, match="no such folder|no evaluation"):
            read_matrices(folder)
