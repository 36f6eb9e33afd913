"""HuatuoGPT-Vision's collection becomes a folder that trains, as MedVLM-R1's code would take it, and what is wrong is said."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from engine.command.main import run_command
from engine.data.questions import load_questions
from engine.errors import InputError
from recipes.medvlm_r1_prepare import main

FILE = "medical_multimodel_evaluation_data.json"
MR, CT, XRAY = "MR (Mag-netic Resonance Imaging)", "CT(Computed Tomography)", "X-Ray"


def write_image(name: str, seed: int) -> list[str]:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8 + seed % 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(Path("Collection/images", name))
    return [f"images/{name}"]


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch) -> list[dict]:
    """The collection's rows: 12 of three modalities in turn, and two that MedVLM-R1 does not take."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("Collection/images").mkdir(parents=True)
    listed = [["Hematoma", "Old, healed fracture"], ["Yes", "No ", "Unclear"]]
    rows = [
        {
            "image": write_image(f"{i}.png", i),
            "question": f"What is seen in {i}?",
            "options": listed[i % 2],
            "answer": listed[i % 2][i % 3 % 2],
            "dataset": "OmniMedVQA",
            "subset": (MR, CT, XRAY)[i % 3],
        }
        for i in range(12)
    ]
    other = {
        "image": ["images/gone.png"],
        "question": "What?",
        "options": [],
        "answer": "free text",
        "dataset": "SLAKE",
        "subset": "SLAKE",
    }
    rows[2:2], rows[7:7] = [other], [other]
    Path("Collection", FILE).write_text(json.dumps(rows))
    return rows


def write_test(*rows: dict) -> str:
    """Rows as in MRI_CT_XRAY_300each_dataset.json."""
    published = []
    for row in rows:
        letters = [f"{letter}) {text}" for letter, text in zip("ABC", row["options"], strict=False)]
        solution = "ABC"[row["options"].index(row["answer"])]
        published.append({**row, "problem": "\n".join([row["question"], *letters]), "solution": solution})
    Path("test.json").write_text(json.dumps(published))
    return "test.json"


def of(rows: list[dict], subset: str) -> list[dict]:
    return [row for row in rows if row["subset"] == subset]


def prepare(*flags: str, data: str = "Collection", output: str = "out") -> dict:
    return main(["--data", data, "--output", output, *flags])


def test_train_rows_are_those_of_the_published_code_in_its_order(rows, tmp_path):
    """Filter, first so many, concatenate, shuffle with seed 42: with `datasets`, as the published code does."""
    first = [row for subset in (MR, CT, XRAY) for row in of(rows, subset)[:3]]
    expected = Dataset.from_list(first).shuffle(seed=42)
    headline = prepare("--dataset_selection", "COMBINED", "--rows", "3")
    counts = {"train_rows": 9, "test_rows": 0, "missing_images": 0, "bad_rows": 0, "leaked_rows": 0}
    assert headline == counts | {"output": str(tmp_path / "out")}
    made = json.loads(Path("out/train.json").read_text())
    assert [row["original"] for row in made] == [row["image"][0].removeprefix("images/") for row in expected]
    for row, source in zip(made, expected, strict=True):
        lines = [f"{letter}) {text}" for letter, text in zip("ABC", source["options"], strict=False)]
        assert row["problem"] == source["question"] + "\n" + "\n".join(lines) and row["modality"] == source["subset"]
        assert row["solution"] == "ABC"[source["options"].index(source["answer"])]
        assert Path("out", row["image"]).read_bytes() == Path("Collection", source["image"][0]).read_bytes()
    assert load_questions("out")[0]["images"][0].mode == "RGB"


@pytest.mark.parametrize("selection, subset", [("MR", MR), ("CT", CT), ("XRAY", XRAY)])
def test_one_modality_can_be_selected_and_mri_is_the_default(rows, selection, subset):
    flags = [] if selection == "MR" else ["--dataset_selection", selection]
    assert prepare(*flags)["train_rows"] == 4
    assert json.loads(Path("out/report.json").read_text())["names"] == {"train": {subset: 4}, "test": {}}


def saved_as(kind: str, rows: list[dict]) -> tuple[str, list[str]]:
    """The rows in another real format -> (its name, what else must be said)."""
    rows = [row for row in rows if row["dataset"] == "OmniMedVQA"]
    named = Dataset.from_list(rows)
    if kind == "parquet of names":
        named.to_parquet("Collection/rows.parquet")
        return "Collection/rows.parquet", []
    if kind == "saved names":
        DatasetDict({"test": named}).save_to_disk("saved")
        return "saved", ["--images", "Collection"]
    cells = [{"bytes": Path("Collection", row["image"][0]).read_bytes(), "path": row["image"][0]} for row in rows]
    stored = named.remove_columns("image").add_column("image", cells).cast_column("image", ImageFeature())
    if kind == "saved images":
        stored.save_to_disk("saved")
        return "saved", []
    Path("hub/data").mkdir(parents=True)
    stored.to_parquet("hub/data/test-00000-of-00001.parquet")
    return "hub", []


@pytest.mark.parametrize("kind", ["parquet of names", "saved names", "saved images", "parquet shards with images"])
def test_every_format_gives_the_same_folder(rows, kind):
    prepare("--dataset_selection", "COMBINED", "--rows", "2")
    data, flags = saved_as(kind, rows)
    prepare("--dataset_selection", "COMBINED", "--rows", "2", *flags, data=data, output="other")
    assert Path("other/train.json").read_text() == Path("out/train.json").read_text()
    for image in Path("out/images/train").iterdir():
        assert Path("other/images/train", image.name).read_bytes() == image.read_bytes()


def test_the_published_test_file_becomes_the_test_part_and_leaks_are_found(rows):
    """One test row shares its file with a train row, one its pixels, one nothing."""
    shutil.copy("Collection/images/3.png", "Collection/images/copy.png")
    test = [of(rows, MR)[0], {**of(rows, MR)[1], "image": ["images/copy.png"]}, of(rows, XRAY)[0]]
    headline = prepare("--test", write_test(*test))
    assert (headline["train_rows"], headline["test_rows"], headline["leaked_rows"]) == (4, 3, 2)
    report = json.loads(Path("out/report.json").read_text())
    assert [(leak["row"], leak["same"]) for leak in report["leaked_rows"]] == [(0, ["path", "pixels"]), (1, ["pixels"])]
    assert [row["modality"] for row in json.loads(Path("out/test.json").read_text())] == [MR, MR, XRAY]
    headline = prepare("--test", "test.json", "--drop_leaked", "--overwrite")
    assert (headline["train_rows"], headline["test_rows"], headline["leaked_rows"]) == (2, 3, 2)
    assert json.loads(Path("out/report.json").read_text())["dropped_train_rows"] == 2
    left = {row["original"] for row in json.loads(Path("out/train.json").read_text())}
    assert left == {"6.png", "9.png"} and len(list(Path("out/images/train").iterdir())) == 2


def test_bad_rows_stop_the_run_or_are_listed(rows):
    os.remove("Collection/images/3.png")
    rows[0]["answer"] = "Edema"
    Path("Collection", FILE).write_text(json.dumps(rows))
    with pytest.raises(InputError, match="data.json: row 0: answer 'Edema' is not an option .expected one of A, B; rows count"):
        prepare()
    headline = prepare("--on_bad_row", "skip")
    assert (headline["train_rows"], headline["bad_rows"], headline["missing_images"]) == (2, 2, 1)
    assert json.loads(Path("out/report.json").read_text())["missing_images"] == ["images/3.png"]


def test_a_folder_of_another_command_is_not_replaced():
    prepare()
    with pytest.raises(InputError, match=r"out: exists already \(--overwrite replaces it\)"):
        prepare()
    Path("out/report.json").write_text(json.dumps({"options": {"splits": "Splits"}}))
    with pytest.raises(InputError, match="out: was not made by this command and is not replaced"):
        prepare("--overwrite")


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--data", "nowhere.json"], "nowhere.json: no such file or folder (expected a .json,"),
        (
            ["--data", "Nowhere/Data"],
            "--images is missing: the folder that holds images/, unpacked from the images.zip of Nowhere/Data",
        ),
        (["--data", "Nowhere/Data", "--images", "."], "Nowhere/Data: no such file or folder, and not to be had from the hub: "),
        (["--rows", "0"], "--rows 0: expected a number, at least 1"),
        (
            ["--dataset_selection", "XRAY", "--data", "ct.json"],
            "ct.json: no row about X-Ray (expected such a `modality` or `subset`)",
        ),
        (["--test", "gone.json"], "gone.json: no such file or folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(rows, flags, line, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    Path("ct.json").write_text(json.dumps(of(rows, CT)))
    with pytest.raises(InputError) as error:
        prepare(*flags)
    assert str(error.value).startswith(line) and "\n" not in str(error.value) and not Path("out").exists()


def test_a_missing_or_wrong_flag_ends_with_exit_code_2(capsys):
    for flags, message in [
        ([], "required: --output"),
        (["--output", "out", "--dataset_selection", "MRI"], "invalid choice: 'MRI'"),
    ]:
        with pytest.raises(SystemExit) as end:
            run_command(main, flags)
        assert end.value.code == 2 and message in capsys.readouterr().err
