"""The published splits become a folder that trains, and what is wrong with them is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.questions import load_questions
from engine.errors import InputError
from recipes.medr1_prepare import main

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = "Which modality? A)CT, B)MRI"


def row(name: str, answer: str = "A", problem: str = PROBLEM) -> dict:
    return {"image": f"Images/{name}", "problem": problem, "solution": f"<answer> {answer} </answer>"}


def write_split(kind: str, split: str, name: str, rows: list[dict]) -> None:
    path = Path("Splits") / kind / split / f"{name}_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


@pytest.fixture(autouse=True)
def published(tmp_path, monkeypatch) -> Path:
    """A small copy of the published layout: two modalities, one image in both parts, one also under another name."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    images = Path("OmniMedVQA/Images/Chest CT Scan/test & more")
    images.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in {"a (1).png": (50, 40), "b.bmp": (20, 30), "both.png": (16, 16), "c.png": (9, 9), "d.jpg": (40, 40)}.items():
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(images / name)
    Image.open(images / "c.png").save(images / "same pixels.tif")
    folder = "Chest CT Scan/test & more"
    names = ["a (1).png", "b.bmp", "both.png", "both.png", "c.png"]
    train = [row(f"{folder}/{name}", problem=f"{i}? A)CT, B)MRI") for i, name in enumerate(names)]
    test = [row(f"{folder}/{name}", "B") for name in ("d.jpg", "both.png", "same pixels.tif")]
    write_split("modality", "train", "CT(Computed Tomography)", train)
    write_split("modality", "test", "CT(Computed Tomography)", test)
    write_split("modality", "train", "OCT (Optical Coherence Tomography", train[:1])
    write_split("question_type", "test", "Modality Recognition", [test[0], *train[:2]])
    return tmp_path


def prepare(*flags: str, output: str = "out") -> dict:
    return main(["--splits", "Splits", "--images", "OmniMedVQA", "--output", output, *flags])


def test_the_folder_holds_resized_train_images_and_original_test_images(published):
    headline = prepare("--names", "CT")
    output = str(published / "out")
    expected = {"train_rows": 5, "test_rows": 3, "missing_images": 0, "bad_rows": 0, "leaked_rows": 2, "output": output}
    assert headline == expected
    train, test = load_questions("out"), load_questions("out", split="test")
    assert (len(train), len(test)) == (5, 3)
    original = Image.open("OmniMedVQA/Images/Chest CT Scan/test & more/a (1).png")
    resized = np.asarray(original.resize((384, 384), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(train[0]["images"][0]), resized)
    rows = json.loads(Path("out/test.json").read_text())
    assert Path("out", rows[0]["image"]).read_bytes() == Path("OmniMedVQA", rows[0]["original"]).read_bytes()
    assert rows[0]["image"].endswith(".jpg") and rows[0]["solution"] == "<answer> B </answer>"
    assert not list(published.glob(".out*"))


def test_rows_carry_both_published_labels():
    prepare()
    rows = json.loads(Path("out/train.json").read_text())
    assert [r["modality"] for r in rows] == ["CT(Computed Tomography)"] * 5 + ["OCT (Optical Coherence Tomography"]
    assert [r.get("question_type") for r in rows[:3]] == ["Modality Recognition", "Modality Recognition", None]
    assert load_questions("out", split="test").record(0)["question_type"] == "Modality Recognition"


def test_images_are_stored_once():
    prepare()
    assert len(list(Path("out/images/train").iterdir())) == 4 and len(list(Path("out/images/test").iterdir())) == 3


def test_leakage_is_found_by_path_and_by_pixels():
    prepare("--names", "CT")
    leaks = json.loads(Path("out/report.json").read_text())["leaked_rows"]
    assert [(leak["row"], leak["same"]) for leak in leaks] == [(1, ["path", "pixels"]), (2, ["pixels"])]
    assert leaks[1]["image"] == ["Images/Chest CT Scan/test & more/same pixels.tif"]


def test_leaked_images_can_be_dropped_from_train():
    headline = prepare("--names", "ct", "--drop_leaked")
    assert (headline["train_rows"], headline["test_rows"], headline["leaked_rows"]) == (2, 3, 2)
    assert json.loads(Path("out/report.json").read_text())["dropped_train_rows"] == 3
    assert len(list(Path("out/images/train").iterdir())) == 2 and len(load_questions("out")) == 2


def test_sizes_are_chosen_for_both_parts():
    prepare("--names", "CT", "--size", "56", "--resize_test")
    assert all(load_questions("out", split=split)[0]["images"][0].size == (56, 56) for split in ("train", "test"))


def test_missing_images_and_bad_rows_are_counted_and_listed():
    rows = [
        row("gone.png"),
        row("gone.png", "B"),
        row("Chest CT Scan/test & more/c.png", "E"),
        row("Chest CT Scan/test & more/b.bmp"),
    ]
    write_split("modality", "train", "X-Ray", rows)
    with pytest.raises(InputError, match="X-Ray_train.json: row 2: answer 'E' is not an option"):  # texts come before images
        prepare("--names", "X-Ray")
    assert not Path("out").exists()
    headline = prepare("--names", "X-Ray", "--on_bad_row", "skip")
    assert headline["train_rows"] == 1 and headline["missing_images"] == 1 and headline["bad_rows"] == 3
    report = json.loads(Path("out/report.json").read_text())
    assert report["missing_images"] == ["Images/gone.png"] and not Path("out/test.json").exists()
    assert "row 2: answer 'E' is not an option (expected one of A, B" in report["bad_rows"][2]


def test_a_folder_is_replaced_only_on_demand_and_only_if_it_is_ours():
    prepare("--names", "CT")
    with pytest.raises(InputError, match=r"out: exists already \(--overwrite replaces it\)"):
        prepare("--names", "OCT")
    assert prepare("--names", "OCT", "--overwrite")["train_rows"] == 1 and not Path("out/test.json").exists()
    with pytest.raises(InputError, match="OmniMedVQA: was not made by this command and is not replaced"):
        prepare("--overwrite", output="OmniMedVQA")
    assert Path("OmniMedVQA/Images").exists()


def test_a_failed_run_leaves_nothing_behind(published, monkeypatch):
    monkeypatch.setattr("engine.data.prepare.folder._find_leaks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare()
    assert not Path("out").exists() and not list(published.glob(".out*"))


def test_the_images_folder_itself_will_do():
    assert main(["--splits", "Splits", "--images", "OmniMedVQA/Images", "--output", "out"])["train_rows"] == 6


@pytest.mark.parametrize(
    "flags, line",
    [
        (
            ["--splits", "Nowhere"],
            "Nowhere/modality: no split files (expected train/<name>_train.json and test/<name>_test.json in it)",
        ),
        (["--images", "Nowhere"], "Nowhere: no such folder (expected the one that holds OmniMedVQA's Images)"),
        (["--names", "PET"], "Splits/modality: no split files for 'PET' (expected one of CT(Computed Tomography), OCT (Optical"),
        (["--size", "3"], "--size 3: expected a number, at least 28 and at most 4096"),
    ],
)
def test_bad_arguments_are_one_line(flags, line):
    with pytest.raises(InputError) as error:
        prepare(*flags)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def command(*flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "recipes.medr1_prepare", *flags]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=120)


def test_the_command_prints_one_line_and_ends_with_2_on_bad_input():
    done = command("--splits", "Splits", "--images", "OmniMedVQA", "--output", "out")
    assert done.returncode == 0 and json.loads(done.stdout)["leaked_rows"] == 2 and done.stdout.count("\n") == 1
    again = command("--splits", "Splits", "--images", "OmniMedVQA", "--output", "out")
    assert again.returncode == 2 and again.stdout == "" and again.stderr.endswith("exists already (--overwrite replaces it)\n")
    assert "Traceback" not in again.stderr


def test_real_images_are_prepared(mini_data):
    rows = json.loads((mini_data / "omnimedvqa_train.json").read_text())[:20]
    write_split("modality", "train", "Dermoscopy", rows)
    headline = main(["--splits", "Splits", "--images", str(mini_data), "--output", "out", "--names", "dermoscopy"])
    assert headline["train_rows"] == 20 and load_questions("out")[0]["images"][0].size == (384, 384)


def test_split_files_may_be_tables_and_what_macos_leaves_beside_them_is_none(published):
    whole = prepare("--names", "CT")
    for split in ("train", "test"):
        path = Path("Splits/modality", split, f"CT(Computed Tomography)_{split}.json")
        rows = json.loads(path.read_text())
        lines = ["image;problem;solution", *(f'{row["image"]};"{row["problem"]}";{row["solution"]}' for row in rows)]
        path.with_suffix(".csv").write_text("\n".join(lines))
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
        path.unlink()
    assert prepare("--names", "CT", output="tables") == {**whole, "output": str(published / "tables")}
    assert Path("tables/train.json").read_text() == Path("out/train.json").read_text()


def test_half_a_character_is_a_bad_row_and_not_the_end_of_the_preparation(published):
    rows = [row("Chest CT Scan/test & more/d.jpg", problem=f"{text}? A)CT, B)MRI") for text in ("\ud83d", "What")]
    write_split("modality", "train", "CT(Computed Tomography)", rows)
    with pytest.raises(InputError, match="row 0: problem has half a character"):
        prepare("--names", "CT")
    assert prepare("--names", "CT", "--on_bad_row", "skip")["bad_rows"] == 1
