"""MeCoVQA's files are read as MedPLIB publishes them, and whatever cannot be used is one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from engine.data.mecovqa.rows import load_mecovqa
from engine.errors import InputError
from tests.engine.data.mecovqa.conftest import CT, SIZE

GROUNDED = ("<image>\nCould you segment out the liver in this image?", f"<SEG> <mask>masks/{CT}--0001_000.png</mask>")
ABOUT_REGION = ("<image>\nWhat is in <region>masks/one.png</region>, doctor?", "The liver.")
COMPLEX = ("<image>\nWhich modality is this?", "CT")


def item(*texts: str, image: str | None = f"images/{CT}.png", **keys) -> dict:
    """One conversation: questions and answers by turns."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": CT, "conversations": turns, **({} if image is None else {"image": image}), **keys}


def write(root: Path, rows: list, name: str = "train/MeCoVQA-Grounding.json") -> Path:
    path = root / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_the_three_kinds_of_questions_are_read(root):
    rows = load_mecovqa(write(root, [item(*GROUNDED), item(*ABOUT_REGION), item(*COMPLEX)]))
    grounded, region, asked = rows
    assert [row["kind"] for row in (grounded, region, asked)] == ["grounding", "region", "complex"]
    assert (grounded["question"], grounded["answer"]) == ("Could you segment out the liver in this image?", "<SEG>")
    (mask,) = grounded["masks"]
    assert mask.mode == "L" and mask.size == grounded["images"][0].size == SIZE and set(np.unique(mask)) == {0, 255}
    assert (np.asarray(mask) > 0).sum() == 120 and grounded["region"] is None and grounded["answer_type"] is None
    assert region["question_parts"] == [
        {"type": "text", "text": "What is in "},
        {"type": "region"},
        {"type": "text", "text": ", doctor?"},
    ]
    assert region["question"] == "What is in [region], doctor?" and region["masks"] == []
    assert region["region"].size == SIZE and (np.asarray(region["region"]) == 255).sum() == 120  # stored as 0 and 1
    assert (asked["answer"], asked["answer_type"], asked["region"]) == ("CT", "open", None)
    assert (
        asked["images"][0].mode == "RGB"
        and asked["image_id"] == str(root / "images" / f"{CT}.png")
        and asked["modality"] == "ct_00"
    )
    assert grounded["mask_ids"] == [f"masks/{CT}--0001_000.png"] and region["region_id"] == "masks/one.png"
    json.dumps(rows.records)


def test_names_without_png_are_found_also_of_masks(root):
    rows = [
        item(GROUNDED[0], "<SEG> <mask>masks/full</mask>", image=f"images/{CT}"),
        item(*COMPLEX, image="images\\photo"),
        item(*COMPLEX, image="photo.png"),
    ]
    found = load_mecovqa(write(root, rows))
    assert [Path(record["image_id"]).name for record in found.records] == [f"{CT}.png", "photo.png", "photo.png"]
    assert found.record(0)["mask_ids"] == ["masks/full.png"] and found.record(1)["modality"] is None


def test_the_classes_of_masks_are_those_of_the_mapping_in_the_root(root):
    path = write(root, [item(*GROUNDED), item(GROUNDED[0], "<SEG> <mask>masks/one.png</mask>")])
    assert [record["mask_classes"] for record in load_mecovqa(path).records] == [[None], [None]]
    (root / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps({"CAD_PE": {"liver": "0001"}}))
    assert [record["mask_classes"] for record in load_mecovqa(path).records] == [["liver"], [None]]


def test_masks_of_0_and_1_of_0_and_255_and_of_twice_the_size_are_the_same(root):
    rows = [item(GROUNDED[0], f"<SEG> <mask>masks/{name}.png</mask>") for name in ("one", "full", "large", "empty")]
    one, full, large, empty = (np.asarray(row["masks"][0]) for row in load_mecovqa(write(root, rows)))
    assert one.max() == 255 and (one == full).all() and (one == large).all() and not empty.any()


def test_an_answer_may_have_several_masks_in_the_order_of_its_segs(root):
    answer = "The left <SEG><mask>masks/one.png</mask> and the right <SEG> <mask> masks/empty.png </mask>."
    (row,) = load_mecovqa(write(root, [item(GROUNDED[0], answer)]))
    assert row["answer"] == "The left <SEG> and the right <SEG> ." and [np.asarray(mask).any() for mask in row["masks"]] == [
        True,
        False,
    ]


def test_a_conversation_is_a_row_a_question_with_the_turns_before(root):
    path = write(root, [item(*COMPLEX, "And this?", "A liver.", *(text.replace("<image>\n", "") for text in ABOUT_REGION))])
    first, second, third = load_mecovqa(path)
    assert (first["history"], first["turn"], first["row"]) == ([], 0, 0)
    said = [{"role": "user", "content": "Which modality is this?"}, {"role": "assistant", "content": "CT"}]
    assert second["history"] == said and len(third["history"]) == 4 and third["kind"] == "region" and third["turn"] == 2
    assert all(len(row["images"]) == 1 for row in (first, second, third))


def test_a_row_without_image_is_text_alone(root):
    (row,) = load_mecovqa(write(root, [item("What is a liver?", "An organ.", image=None)]))
    assert row["images"] == [] and row["image_id"] == "" and row["kind"] == "complex"
    assert len(load_mecovqa(root / "train/MeCoVQA-Grounding.json").handles[0]) == 0


@pytest.mark.parametrize(
    "file, keys, answer, expected",
    [
        ("MeCoVQA_Complex_VQA_test.json", {}, "CT", "open"),
        ("MeCoVQA_Complex_VQA_test.json", {}, "Yes.", "closed"),
        ("MeCoVQA_Region_Closed_VQA_test.json", {}, "CT", "closed"),
        ("MeCoVQA_Complex_VQA_test.json", {"answer_type": "CLOSED"}, "CT", "closed"),
        ("MeCoVQA_Region_Closed_VQA_test.json", {"answer_type": "Open"}, "yes", "open"),
        ("MeCoVQA_Complex_VQA_test.json", {"answer_type": 3}, "CT", "open"),
    ],
)
def test_the_type_of_an_answer_is_said_by_row_file_or_words(root, file, keys, answer, expected):
    assert load_mecovqa(write(root, [item(COMPLEX[0], answer, **keys)], f"test/{file}")).record(0)["answer_type"] == expected


def test_a_folder_has_splits_and_kinds(root):
    write(root, [item(*GROUNDED)] * 3)
    write(root, [item(*COMPLEX)] * 2, "train/MeCoVQA-Complex.json")
    write(root, [item(*COMPLEX)], "test/MeCoVQA_Complex_VQA_test.json")
    assert len(load_mecovqa(root)) == 5 and len(load_mecovqa(root, split="test")) == 1
    assert len(load_mecovqa([root, root / "test/MeCoVQA_Complex_VQA_test.json"])) == 6
    grounded = load_mecovqa(root, kinds=["grounding"])
    assert len(grounded) == 3 and {record["kind"] for record in grounded.records} == {"grounding"}
    assert len(load_mecovqa(root, limit=2)) == 2 and [r["row"] for r in load_mecovqa(root, first=4).records] == [0, 1, 0, 1]
    with pytest.raises(InputError, match="no region rows in it"):
        load_mecovqa(root, kinds=["region"])
    with pytest.raises(InputError, match=r"no val/MeCoVQA\*.json \(expected a file, or a folder with such files"):
        load_mecovqa(root, split="val")


def test_an_image_root_may_be_named(root, tmp_path):
    path = tmp_path / "elsewhere.json"
    path.write_text(json.dumps([item(*GROUNDED)]))
    assert load_mecovqa(path, image_root=root).record(0)["image_id"] == str(root / "images" / f"{CT}.png")
    with pytest.raises(InputError, match=f"elsewhere.json: row 0: image 'images/{CT}.png': no such image file"):
        load_mecovqa(path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_mecovqa(path, image_root="nowhere")


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("text", "not a JSON object"),
        ({"image": "images/photo.png"}, "no conversations (expected a list of turns, human and gpt in turn"),
        (item("a"), "no conversations"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
            "turn 0 is from 'gpt' (expected human",
        ),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]}, "question is not text"),
        (item("<image>", "CT"), "empty question"),
        (item("<image> a <image>", "CT"), "<image> 2 times in question 0 (expected once"),
        (item(*COMPLEX, "<image> b", "CT"), "<image> 1 times in question 1"),
        (item(*GROUNDED, "And?", "No."), "question 1 comes after a region or a mask"),
        (item(COMPLEX[0], ""), "empty answer"),
        (item(COMPLEX[0], "The liver <mask>masks/one.png</mask>"), "an answer with 1 masks and 0 <SEG> (expected as many"),
        (item(COMPLEX[0], "<SEG>"), "an answer with 0 masks and 1 <SEG>"),
        (item(COMPLEX[0], "<SEG> <mask>masks/one.png"), "<mask> without a file and </mask>"),
        (item(COMPLEX[0], "<SEG> <mask> </mask>"), "<mask> without a file"),
        (item(COMPLEX[0], "in <region>masks/one.png</region>"), "<region> in an answer"),
        (item("<mask>masks/one.png</mask> a", "b"), "<mask> in a question"),
        (item("<region><image></region> a", "b"), "<region> without a file"),
        (item("<region>masks/one.png</region> or <region>masks/full.png</region>", "b"), "a question with two regions"),
        (item("<region>masks/one.png</region>", "b"), "empty question"),
        (item("<region>masks/empty.png</region>?", "b"), "region 'empty.png' is empty"),
        (item(GROUNDED[0], "<SEG> <mask>masks/odd.png</mask>"), "mask 'odd.png' is 20 x 20, its image 24 x 20"),
        (item(GROUNDED[0], "<SEG> <mask>masks/gone.png</mask>"), "mask 'masks/gone.png': no such image file"),
        (item(GROUNDED[0], "<SEG> <mask>masks/text.png</mask>"), "mask 'text.png': not an image of a known kind"),
        (item(*COMPLEX, image="images/text.png"), "image 'text.png': not an image of a known kind"),
        (
            item(*COMPLEX, image="images/gone"),
            "image 'images/gone': no such image file (expected a file of this name, or of this and .png",
        ),
        (item(*COMPLEX, image="../secret.png"), "image path '../secret.png' leaves"),
        (item(*COMPLEX, image="/etc/passwd"), "image path '/etc/passwd' leaves"),
        (item(*COMPLEX, image="images/../../secret"), "image path 'images/../../secret' leaves"),
        (item(GROUNDED[0], "<SEG> <mask>../secret.png</mask>"), "mask path '../secret.png' leaves"),
        (item(*COMPLEX, image=["images/photo.png"]), "unusable image"),
        (item(*COMPLEX, image=None), "missing key 'image'"),
        (item(COMPLEX[0], f"<SEG> <mask>{'a' * 999}</mask>"), f"mask '{'a' * 200}': no such image file"),
        (item("<image> \ud800", "CT"), "question has half a character"),
        (item("a" * 100_001, "CT"), "question of 100,001 characters"),
    ],
)
def test_a_bad_row_is_one_line_and_can_be_skipped(root, tmp_path, bad, reason):
    (tmp_path / "secret.png").write_bytes((root / "images/photo.png").read_bytes())
    for folder in ("images", "masks"):
        (root / folder / "text.png").write_text("no image")
    path = write(root, [item(*GROUNDED), bad])
    with pytest.raises(InputError) as error:
        load_mecovqa(path)
    line = str(error.value)
    assert (
        re.match(re.escape(str(path)) + ": row 1: ", line) and reason in line and "\n" not in line and "rows count from 0" in line
    )
    rows = load_mecovqa(path, on_bad_row="skip")
    assert len(rows) == 1 and rows.skipped == [line]
    with pytest.raises(InputError, match="all 1 rows are bad; the first: "):
        load_mecovqa(write(root, [bad]), on_bad_row="skip")


def test_a_file_that_cannot_be_used_is_one_line(root):
    (root / "a.json").write_text("{")
    (root / "b.json").write_text("[]")
    for name, message in {"a.json": "not JSON", "b.json": "no complex or region", "c.json": "cannot be read"}.items():
        with pytest.raises(InputError, match=message):
            load_mecovqa(root / name)
    with pytest.raises(InputError, match="no data set given"):
        load_mecovqa([])
