"""Skin lesions as questions: the published words, every format, and what is wrong said in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from engine.data.lesions import DIAGNOSES, QUESTIONS, ask, load_skin, skin_prompt
from engine.data.prepare.ham10000 import write_records
from engine.errors import InputError


def record(number: int, dx: str = "mel", box: tuple | None = (2, 3, 12, 9), **changed) -> dict:
    return {
        "lesion_id": f"HAM_{number // 2}",
        "image_id": f"ISIC_{number}",
        "dx": dx,
        "dx_type": "histo",
        "age": 80.0,
        "sex": "male",
        "localization": "scalp",
        "bbox": box and [float(side) for side in box],
        "area_coverage": box and 0.1,
        "spatial_description": box and "lesion located in upper-left region",
        "mask_available": box is not None,
        **changed,
    }


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch) -> list[dict]:
    """Seven lesions, one of each diagnosis, the last without a mask; the published pair of files, and images in a folder."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for i in range(len(DIAGNOSES)):
        save_image(i)
    rows = [record(i, dx, (2, 3, 12, 9) if i < 6 else None) for i, dx in enumerate(DIAGNOSES)]
    rows[1]["age"] = None
    Image.new("L", (60, 45), 255).save("images/ISIC_0_segmentation.png")
    write_records(Path("."), rows)
    return rows


def save_image(number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"images/ISIC_{number}.{'jpg' if number % 2 else 'png'}")


def load(rows: list[dict], **options):
    Path("rows.json").write_text(json.dumps(rows))
    return load_skin("rows.json", **options)


NAME = "ham10000_with_spatial_data"


def test_questions_and_answers_are_the_published_ones():
    row = load_skin(f"{NAME}.json").record(3)
    assert row["problem"] == "Analyze this skin lesion, provide a diagnosis, and describe its location."
    assert row["solution"] == "This appears to be dermatofibroma. The lesion is located in the upper-left region."
    row = load_skin(f"{NAME}.json", question="diagnosis").record(2)
    assert row["problem"] == "Analyze this skin lesion and provide a diagnosis."
    assert row["solution"] == "This appears to be benign keratosis-like lesion."
    row = load_skin(f"{NAME}.json", question="tagged").record(1)
    assert row["problem"] == (
        "Analyze this skin lesion image. Respond in this exact format: <diagnosis>condition_name</diagnosis> "
        "<location>body_part</location> <bbox>[x1, y1, x2, y2]</bbox>"
    )
    expected = "<diagnosis>basal cell carcinoma</diagnosis> <location>scalp</location> <bbox>[2, 3, 12, 9]</bbox>"
    assert row["solution"] == expected
    row = load_skin(f"{NAME}.json", question="box").record(0)
    assert row["solution"].endswith("keratosis. The lesion is located in the upper-left region. Its bounding box is [2, 3, 12, 9].")


def test_a_row_has_what_trainers_and_rewards_take():
    row = load_skin(f"{NAME}.json")[0]
    assert [image.size for image in row["images"]] == [(60, 45)] and row["images"][0].mode == "RGB"
    assert {key: row[key] for key in ("name", "dx", "diagnosis", "lesion_id", "localization", "question_type", "row")} == {
        "name": "ISIC_0",
        "dx": "akiec",
        "diagnosis": "actinic keratosis",
        "lesion_id": "HAM_0",
        "localization": "scalp",
        "question_type": "location",
        "row": 0,
    }
    assert row["bbox"] == [2.0, 3.0, 12.0, 9.0] and row["age"] == 80.0 and row["spatial_description"].endswith("upper-left region")
    assert Path(row["mask"]).name == "ISIC_0_segmentation.png" and Path(row["image_id"]).name == "ISIC_0.png"
    message = skin_prompt(row)
    assert message == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS["location"]}]}]


def test_every_format_gives_the_same_rows(records):
    expected = [{**row, "source": None} for row in load_skin(f"{NAME}.json").records]
    assert [{**row, "source": None} for row in load_skin(f"{NAME}.csv").records] == expected
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in records))
    assert [{**row, "source": None} for row in load_skin("rows.jsonl").records] == expected
    Path("other").mkdir()
    text = Path(f"{NAME}.json").read_text().replace("null", "NaN", 1)  # pandas' word for the missing age
    Path("other/rows.json").write_text(text)
    assert [{**row, "source": None} for row in load_skin("other/rows.json", image_root="images").records] == expected


def test_a_copy_of_the_hub_data_set_holds_its_images(records):
    """Columns image, diagnosis, localization, bbox: the region follows from the box."""
    Path("hub/data").mkdir(parents=True)
    cells = [{"bytes": Path("images", f"ISIC_{i}.png").read_bytes(), "path": None} for i in (0, 2)]
    boxes = [[2.0, 3.0, 12.0, 9.0], [50.0, 40.0, 60.0, 45.0]]
    columns = {"image": cells, "diagnosis": ["mel", "Melanocytic nevus"], "localization": ["back", "face"], "bbox": boxes}
    Dataset.from_dict(columns).cast_column("image", ImageFeature()).to_parquet("hub/data/train-00000-of-00001.parquet")
    lesions = load_skin("hub", question="tagged")
    assert lesions[1]["images"][0].size == (60, 45) and [row["dx"] for row in lesions.records] == ["mel", "nv"]
    regions = [row["spatial_description"] for row in lesions.records]
    assert regions == ["lesion located in upper-left region", "lesion located in lower-right region"]
    assert lesions.record(0)["solution"].endswith("<location>back</location> <bbox>[2, 3, 12, 9]</bbox>")


def test_the_region_follows_from_the_box_where_the_file_leaves_it_out(records):
    rows = [{key: value for key, value in row.items() if key != "spatial_description"} for row in records]
    rows[1]["bbox"] = [20, 38, 30, 45]
    regions = [row["spatial_description"] for row in load(rows).records]
    assert regions[:2] == ["lesion located in upper-left region", "lesion located in lower-center region"] and regions[6] is None


def test_a_share_is_asked_the_question_and_lesions_without_a_box_never(records):
    rows = [record(0, image_id=f"ISIC_{i % 6}", lesion_id=str(i)) for i in range(6)] + [records[6]]
    kinds = [row["question_type"] for row in load(rows, question="box").records]
    assert kinds == ["box"] * 6 + ["diagnosis"]
    assert len(load(rows, boxes_only=True)) == 6
    none, some = (load(rows, ratio=ratio).records for ratio in (0.0, 0.5))
    assert {row["question_type"] for row in none} == {"diagnosis"}
    asked = {row["name"] for row in some if row["question_type"] == "location"}
    assert 0 < len(asked) < 6
    again = load(rows[::-1], ratio=0.5).records
    assert {row["name"] for row in again if row["question_type"] == "location"} == asked
    seeds = {
        frozenset(row["name"] for row in load(rows, ratio=0.5, seed=s).records if row["question_type"] == "location")
        for s in range(9)
    }
    assert len(seeds) > 1


def test_about_a_fifth_is_asked_for_the_location_in_stage_one():
    rows = [record(0, image_id="ISIC_0", lesion_id=str(i)) for i in range(3)]
    for i in range(400):
        Path(f"images/many_{i}.png").symlink_to("ISIC_0.png")
    many = load([{**rows[0], "image_id": f"many_{i}"} for i in range(400)], ratio=0.2).records
    assert 50 < sum(row["question_type"] == "location" for row in many) < 110


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"dx": "wart"}, "dx 'wart' (expected one of akiec, bcc, bkl, df, mel, nv, vasc; rows count from 0)"),
        ({"dx": None}, "dx 'None' (expected one of akiec, bcc, "),
        ({"image_id": "ISIC_9"}, "image 'ISIC_9': no such image file (expected ISIC_9.jpg, .jpeg or .png in "),
        ({"image_id": "../rows"}, "image '../rows': no such image file"),
        ({"image_id": 3}, "no image_id (expected the name of an image without its ending"),
        ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3] (expected [x1, y1, x2, y2] in pixels with x1 < x2 and y1 < y2, or nothing"),
        ({"bbox": [5, 2, 3, 4]}, "bbox [5, 2, 3, 4] (expected"),
        ({"bbox": [-1, 2, 3, 4]}, "bbox [-1, 2, 3, 4] (expected"),
        ({"bbox": [1, 2, 3, float("nan")]}, "bbox [1, 2, 3, nan] (expected"),
        ({"bbox": [1, 2, True, 4]}, "bbox [1, 2, True, 4] (expected"),
        ({"bbox": "__import__('os')"}, "bbox __import__('os') (expected"),
        ({"bbox": [1, 2, 10**400, 4]}, "bbox [1, 2, 1000"),
        ({"age": "inf"}, "age 'inf' (expected years"),
        ({"localization": "\ud800"}, "half a character"),
        ({"age": "old"}, "age 'old' (expected years, or nothing"),
        ({"spatial_description": "up"}, "spatial_description 'up' (expected 'lesion located in upper-left region' or the like"),
    ],
)
def test_a_bad_row_is_one_line(records, changed, line):
    rows = [records[0], {**records[1], **changed}]
    with pytest.raises(InputError) as error:
        load(rows)
    assert str(error.value).startswith(f"rows.json: row 1: {line}") and "\n" not in str(error.value)
    kept = load(rows, on_bad_row="skip")
    assert len(kept) == 1 and kept.skipped[0] == str(error.value)


def test_a_damaged_image_is_a_bad_row(records):
    Path("images/ISIC_1.jpg").write_bytes(Path("images/ISIC_1.jpg").read_bytes()[:300])
    for rows in (records, [{**row, "spatial_description": None} for row in records]):
        with pytest.raises(InputError, match=r"row 1: image 'images/ISIC_1.jpg': truncated or damaged image"):
            load(rows)


def test_files_that_cannot_be_used_are_one_line(records):
    Path("few.csv").write_text("image_id,age\nISIC_0,3\n")
    Path("ragged.csv").write_text("image_id,dx\nISIC_0,mel,3\n")
    Path("empty.csv").write_text("image_id,dx\n")
    for path, line in [
        ("few.csv", "few.csv: no column dx (expected the columns lesion_id, image_id, dx, "),
        ("ragged.csv", "ragged.csv: row 0, line 2: 3 cells (expected 2, as the header has: "),
        ("empty.csv", "empty.csv: no rows in it (expected the columns"),
        ("gone.csv", "gone.csv: cannot be read: No such file"),
        ("gone.json", "gone.json: no such file or folder"),
        ("images", "images: a folder without train.json"),
    ]:
        with pytest.raises(InputError) as error:
            load_skin(path)
        assert str(error.value).startswith(line)
    with pytest.raises(InputError, match="question 'where' .expected one of diagnosis, location, tagged, box"):
        load_skin(f"{NAME}.json", question="where")
    with pytest.raises(InputError, match="rows.json: no row with a box"):
        load(records[6:], boxes_only=True)


def test_every_question_has_an_answer_for_every_diagnosis():
    for dx, name in DIAGNOSES.items():
        row = record(0, dx) | {"diagnosis": name}
        assert all(name in ask(question, row)[1] for question in QUESTIONS)
