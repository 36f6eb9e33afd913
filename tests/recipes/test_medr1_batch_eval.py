"""`recipes.medr1_batch_eval`: every file of a folder once, one table, and what was done is not done again."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from engine.data.starter.questions import build_starter_data
from engine.errors import InputError
from recipes.medr1_adversarial_eval import main as evaluate_one
from recipes.medr1_batch_eval import main

FEW = ["--max_new_tokens", "32", "--attacks", "clean", "fgsm"]


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Path:
    """Splits as Med-R1 publishes them, of a few starter questions: two modalities and a question type."""
    root, starter = tmp_path_factory.mktemp("data"), build_starter_data()
    shutil.copytree(starter / "images", root / "images")
    rows = json.loads((starter / "test.json").read_text())
    published = {
        "CT": "modality/test/CT(Computed Tomography)_test.json",
        "MRI": "modality/test/MR (Mag-netic Resonance Imaging)_test.json",
    }
    for modality, name in published.items():
        path = root / "Splits" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([row for row in rows if row["modality"] == modality][:6]))
    other = root / "Splits" / "question_type" / "test" / "Modality Recognition_test.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps(rows[:5]))
    return root / "Splits"


@pytest.fixture(scope="module")
def run(splits, tmp_path_factory):
    """(flags, folder, headline) of a run over both kinds."""
    folder = tmp_path_factory.mktemp("batch") / "out"
    flags = ["--splits_dir", str(splits), "--dataset_root", str(splits.parent), "--evaluation_type", "both", *FEW]
    flags += ["--output_dir", str(folder)]
    return flags, folder, main(flags)


def test_each_file_is_a_part_and_has_the_accuracy_it_has_alone(run, splits, tmp_path):
    _, folder, headline = run
    assert headline["parts"] == 3 and headline["num_samples"] == 17
    assert list(headline["by_part"]) == ["modality/CT", "modality/MRI", "question_type/Modality Recognition"]
    file = splits / "modality" / "test" / "CT(Computed Tomography)_test.json"
    alone = evaluate_one([*FEW, "--data", str(file), "--dataset_root", str(splits.parent), "--output_dir", str(tmp_path)])
    assert headline["by_part"]["modality/CT"] == {name: alone[f"accuracy_{name}"] for name in ("clean", "fgsm")}
    clean = (folder / "modality" / "CT" / "evaluation_clean.json").read_text()
    assert json.loads(clean)["results"] == json.loads((tmp_path / "evaluation_clean.json").read_text())["results"]


def test_the_tables_hold_all_parts(run):
    _, folder, headline = run
    lines = list(csv.DictReader((folder / "batch.csv").open(newline="")))
    assert [(line["kind"], line["name"], line["num_samples"]) for line in lines] == [
        ("modality", "CT", "6"),
        ("modality", "MRI", "6"),
        ("question_type", "Modality Recognition", "5"),
    ]
    right = sum(int(line["num_samples"]) * float(line["accuracy_clean"]) for line in lines)
    assert right / 17 == pytest.approx(headline["accuracy_clean"], abs=1e-5)
    published = json.loads((folder / "evaluation_summary.json").read_text())
    assert published["attacks"] == ["clean", "fgsm"] and published["evaluation_type"] == "both"
    for entry, line in zip(published["results"], lines, strict=True):
        assert entry["attacks"]["fgsm"]["accuracy"] == pytest.approx(100 * float(line["accuracy_fgsm"]), abs=1e-3)
        assert Path(entry["attacks"]["clean"]["output_path"]).is_file()
    page = (folder / "report.html").read_text()
    assert "Accuracy by modality" in page and "Modality Recognition" in page


def test_a_part_that_is_done_is_kept_and_one_that_is_not_is_asked(run, monkeypatch):
    flags, folder, headline = run
    done = folder / "modality" / "MRI" / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"shares": {"clean": 1}}))  # damaged, or of a run that was killed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/evaluation_clean.json")}
    assert main(flags) == headline
    asked = {path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert asked == {"MRI"}


def test_other_settings_and_another_file_are_asked_again(run, splits):
    flags, folder, headline = run
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/done.json")}
    assert main([*flags, "--batch_size", "3"])["by_part"] == headline["by_part"]  # no answer depends on it
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*/done.json")} == times
    file = splits / "question_type" / "test" / "Modality Recognition_test.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:4]))
    assert main([*flags, "--epsilon", "0.05"])["num_samples"] == 16
    assert all(path.stat().st_mtime_ns != time for path, time in times.items())


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--splits_dir", "nowhere"], r"^nowhere: no file <kind>/test/\*.json in it \(expected modality"),
        (["--modalities", "PET"], r"^--modalities PET: expected some of CT, Fundus photography, "),
        (["--modalities", "CT", "PET"], r"^--modalities PET: expected some of CT, Fundus photography, "),
        (["--evaluation_type", "task"], "^--splits_dir is missing: the starter questions are divided by modality only$"),
        (["--attacks", "pdg"], "^--attacks pdg: expected fgsm or pgd"),
    ],
)
def test_mistakes_are_one_line(flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=line):
        main([*flags, "--output_dir", "out"])
    assert not Path("out").exists()


def test_a_modality_that_no_file_is_about_is_not_left_out_in_silence(splits, tmp_path):
    flags = ["--splits_dir", str(splits), "--dataset_root", str(splits.parent), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="^--modalities Dermoscopy: expected some of "):
        main([*flags, "--modalities", "CT(Computed Tomography)", "dermoscopy"])


def test_a_bad_file_ends_the_batch_before_it_begins(splits, tmp_path):
    root = shutil.copytree(splits, tmp_path / "Splits")
    (root / "modality" / "test" / "X-Ray_test.json").write_text(
        '[{"image": "images/gone.png", "problem": "? A)CT, B)MRI", "solution": "A"}]'
    )
    flags = ["--splits_dir", str(root), "--dataset_root", str(splits.parent), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="X-Ray_test.json: row 0: image 'images/gone.png': no such image file"):
        main(flags)
    assert not (tmp_path / "out").exists()
