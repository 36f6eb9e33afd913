"""The published subset of grounding rows: what is kept, copied, logged and counted; and what the reader makes of it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.mecovqa.rows import load_mecovqa
from engine.errors import InputError
from recipes.unimed_grounding_subset import main

DATA = "SAMed2Dv1/train/MeCoVQA-Grounding.json"


def item(image: str | None, answer: str | None, **keys) -> dict:
    turns = [{"from": "human", "value": "<image>\nSegment it."}] + ([] if answer is None else [{"from": "gpt", "value": answer}])
    return {"id": "x", "conversations": turns, **({} if image is None else {"image": image}), **keys}


def masked(name: str) -> str:
    return f"<SEG> <mask>masks/{name}</mask>"


ROWS = [
    item("images/a.png", masked("a_0.png"), note="kept as it is"),
    item("images/b", masked("b_0")),  # names without .png
    item("images/gone.png", masked("a_0.png")),
    item("images/a.png", masked("gone.png")),
    item("images/none.png", masked("none.png")),
    item(None, masked("a_0.png")),
    item("images/a.png", None),
    item("images/a.png", "no mask here"),
    item("../secret.png", masked("a_0.png")),
    "no row",
    item("images/deep/c.png", f"Both {masked('a_0.png')} and {masked('deep/c_0.png')}"),
]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("images/a", "images/b", "images/deep/c", "../secret"):
        save(Path(f"SAMed2Dv1/{name}.png"), np.full((6, 8, 3), 90, np.uint8))
    for name in ("a_0", "b_0", "deep/c_0"):
        save(Path(f"SAMed2Dv1/masks/{name}.png"), np.eye(6, 8, dtype=np.uint8))
    write(ROWS)
    return tmp_path


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(rows: list) -> None:
    Path(DATA).parent.mkdir(parents=True, exist_ok=True)
    Path(DATA).write_text(json.dumps(rows), encoding="utf-8")


def test_rows_whose_files_are_there_are_kept_and_copied():
    headline = main(["--data", DATA, "--output", "out"])
    assert {key: headline[key] for key in ("total", "kept", "skipped", "missing_images", "missing_masks", "fixed_names")} == {
        "total": 11,
        "kept": 3,
        "skipped": 8,
        "missing_images": 3,
        "missing_masks": 2,
        "fixed_names": 2,
    }
    assert headline["files"] == headline["copied"] == 6
    log = Path("out/missing_files_log.txt").read_text().splitlines()
    assert log == [
        "Image not found: images/gone.png",
        "Mask not found: masks/gone.png",
        "Image not found: images/none.png",
        "Mask not found: masks/none.png",
        "Image refused: ../secret.png",
    ]
    text = Path("out/train/MeCoVQA-Grounding.json").read_text(encoding="utf-8")
    rows = json.loads(text)
    assert text.startswith('[\n  {\n    "id"') and rows[0] == ROWS[0]  # indented by two, the row as it was
    assert rows[1]["image"] == "images/b.png" and rows[1]["conversations"][1]["value"] == masked("b_0.png")
    assert [row["image"] for row in rows] == ["images/a.png", "images/b.png", "images/deep/c.png"]
    copied = {path.relative_to("out").as_posix() for path in Path("out").rglob("*.png")}
    assert copied == {f"images/{n}.png" for n in ("a", "b", "deep/c")} | {f"masks/{n}.png" for n in ("a_0", "b_0", "deep/c_0")}
    times = [os.stat(Path(folder, "images/a.png")).st_mtime_ns for folder in ("SAMed2Dv1", "out")]
    assert abs(times[0] - times[1]) < 1000  # as copy2


def test_the_subset_is_read_without_its_source():
    main(["--data", DATA, "--output", "out"])
    Path("SAMed2Dv1").rename("gone")
    rows = load_mecovqa("out")
    assert len(rows) == 3 and [len(row["masks"]) for row in rows] == [1, 1, 2]


def test_files_that_are_there_are_not_copied_again():
    main(["--data", DATA, "--output", "out"])
    save(Path("out/images/a.png"), np.zeros((6, 8, 3), np.uint8))
    before = Path("out/images/a.png").read_bytes()
    Path("out/images/b.png").unlink()
    assert main(["--data", DATA, "--output", "out"])["copied"] == 1
    assert Path("out/images/a.png").read_bytes() == before


def test_only_the_first_rows_are_looked_at():
    headline = main(["--data", DATA, "--output", "out", "--first", "3"])
    assert (headline["total"], headline["kept"], headline["missing_images"]) == (3, 2, 1)
    assert len(json.loads(Path("out/train/MeCoVQA-Grounding.json").read_text())) == 2


def test_check_only_counts_and_writes_nothing(root):
    before = sorted(root.rglob("*"))
    headline = main(["--data", DATA, "--check_only"])
    assert headline["kept"] == 3 and "output" not in headline and sorted(root.rglob("*")) == before


def test_check_data_opens_the_first_row_that_can_be_used(caplog):
    write(ROWS[2:3] + ROWS[:1])
    with caplog.at_level("INFO"):
        found = main(["--data", DATA, "--check_data"])
    assert (found["row"], found["bad_rows_before"]) == (1, 1)
    assert found["sample"]["images"] == "RGB image, 6 x 8 pixels, uint8, 90 to 90"
    assert found["sample"]["masks"] == "L image, 6 x 8 pixels, uint8, 0 to 255" and "masks" in caplog.text
    write(ROWS[2:3])
    with pytest.raises(InputError, match="all 1 rows are bad"):
        main(["--data", DATA, "--check_data"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", DATA], "--output is missing"),
        (["--data", DATA, "--output", "out", "--check_only"], "--output: nothing is written with --check_only"),
        (["--output", "out"], "--output: nothing is written"),
        (["--data", "gone.json", "--check_only"], "gone.json: cannot be read"),
        (["--data", DATA, "--output", "SAMed2Dv1"], "is the file that --data names"),
        (["--data", DATA, "--output", DATA], "cannot be written"),
        (["--data", DATA, "--check_only", "--first", "0"], "--first"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(root, flags, message):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_without_flags_the_starter_data_are_checked():
    headline = main([])
    assert (headline["total"], headline["kept"], headline["fixed_names"]) == (600, 600, 60)
