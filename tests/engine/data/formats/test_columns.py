"""Rows by our names: what published data sets and tables of one's own call them, and options however they are listed."""

import json
from pathlib import Path

import pytest
from PIL import Image

from engine.data.formats.columns import our_name, rename
from engine.data.questions import load_questions
from engine.errors import InputError

ASKED = {"image": "a.png", "question": "What is it?"}


def load(*rows, name: str = "rows.json", **options):
    Path(name).write_text(json.dumps(rows))
    return load_questions(name, **options)


def only(row: dict) -> dict:
    return load(row).record(0)


def test_a_raw_row_of_omnimedvqa():
    row = {"dataset": "ACRIMA", "question_id": "ACRIMA_0000", "question_type": "Modality Recognition", "question": "Which?"}
    row |= {"gt_answer": "Fundus imaging", "image_path": "a.png", "option_A": "MRI", "option_B": "Fundus imaging"}
    record = only({**row, "modality_type": "Fundus Photography"})
    assert record["answer"] == "B" and record["problem"] == "Which?\nA) MRI\nB) Fundus imaging"
    assert record["options"] == {"A": "MRI", "B": "Fundus imaging"}
    assert (record["modality"], record["question_type"]) == ("Fundus Photography", "Modality Recognition")
    assert len(load({**row, "modality_type": "OCT"}, {**row, "modality": "CT"}, modalities=["CT"])) == 1


def test_closed_questions_of_slake_become_yes_or_no_and_open_ones_are_bad_rows():
    Path("imgs/xmlab1").mkdir(parents=True)
    Image.new("RGB", (8, 6)).save("imgs/xmlab1/source.jpg")
    row = {"img_id": 1, "img_name": "xmlab1/source.jpg", "q_lang": "en", "location": "Lung", "base_type": "vqa", "qid": 1}
    closed = {**row, "question": "Is it healthy?", "answer": "No", "answer_type": "CLOSED", "content_type": "Abnormality"}
    opened = {**row, "question": "Which organ?", "answer": "Lung", "answer_type": "OPEN", "modality": "CT"}
    questions = load(closed, opened, on_bad_row="skip")
    record = questions.record(0)
    assert record["options"] == {"A": "yes", "B": "no"} and record["answer"] == "B"
    assert record["question_type"] == "Abnormality" and Path(record["image_id"]).name == "source.jpg"
    assert questions.skipped == [
        "rows.json: row 1: no options (expected 'A)..., B)...' in the problem, or a list of options; rows count from 0)"
    ]
    assert only({**opened, "options": ["Liver", "Lung"]})["answer"] == "B"


def test_vqa_rads_rows_find_their_images_and_numbers_are_no_options():
    Path("VQA_RAD Image Folder").mkdir()
    Image.new("RGB", (8, 6)).save("VQA_RAD Image Folder/synpic1.jpg")
    row = {"qid": 1, "image_name": "synpic1.jpg", "question": "Is it enlarged?", "answer_type": "CLOSED ", "question_type": "SIZE"}
    record = only({**row, "answer": "Yes "})
    assert record["answer"] == "A" and record["question_type"] == "SIZE"
    with pytest.raises(InputError, match="row 0: no options"):
        only({**row, "question": "How many?", "answer": 3})


def test_pathvqa_as_the_hub_has_it():
    from datasets import Dataset
    from datasets import Image as ImageFeature

    image = {"bytes": Path("a.png").read_bytes(), "path": None}
    rows = [{"image": image, "question": "Is it benign?", "answer": answer} for answer in ("yes", "no", "acini")]
    Path("hub/data").mkdir(parents=True)
    Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet("hub/data/validation-00000-of-00001-ab12.parquet")
    questions = load_questions("hub", split="validation", on_bad_row="skip")
    assert [record["answer"] for record in questions.records] == ["A", "B"] and len(questions.skipped) == 1


def test_pmc_vqas_table():
    Path("train.csv").write_text(
        "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
        "a.png,What is it?,Blood vessels, Airways, Blood vessels, Nerves, Bones,B\n"
    )
    record = load_questions("train.csv").record(0)
    assert record["answer"] == "B" and record["options"]["D"] == "Bones"


@pytest.mark.parametrize(
    "options",
    [
        ["CT", "MRI", "X-ray"],
        {"A": "CT", "B": "MRI", "C": "X-ray"},
        {"c": "X-ray", "a": "CT", "b": "MRI", "d": None},
        "CT | MRI | X-ray",
        "CT;MRI;X-ray;",
        "CT\nMRI\nX-ray",
        '["CT", "MRI", "X-ray"]',
        "['CT', 'MRI', 'X-ray']",
        '{"A": "CT", "B": "MRI", "C": "X-ray"}',
    ],
)
@pytest.mark.parametrize("answer", ["MRI", " mri", "B", "b"])
def test_options_are_read_however_they_are_listed(options, answer):
    record = only({**ASKED, "options": options, "answer": answer})
    assert record["options"] == {"A": "CT", "B": "MRI", "C": "X-ray"} and record["answer"] == "B"


def test_numbers_are_options_too():
    record = only({**ASKED, "options": [1, 2, 3.5], "answer": 2})
    assert record["options"] == {"A": "1", "B": "2", "C": "3.5"} and record["answer"] == "B"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"A": "CT", "C": "MRI"}, "option C without B (expected options from A on, none of them left out"),
        ({"A": "CT", "B": " ", "C": "MRI"}, "option C without B"),
        ({"options": {"A": "CT", "C": "MRI"}}, "option C without B"),
        ({"options": {"first": "CT"}}, 'unusable options (expected a list of texts, or {"A": text, "B": text, ...}'),
        ({"options": "CT, MRI"}, "unusable options (expected a list of texts, or one text with | or ; or line breaks"),
        ({"options": "[" * 10_000}, "unusable options"),
        ({"options": ["CT", "M\ud83dI"]}, "options has half a character ('M\\ud83dI') (expected Unicode text"),
        ({"question": "\udfff?"}, "question has half a character"),
        ({"image": "a\ud800.png"}, "image has half a character"),
        ({"problem": "What? A) CT, B) MRI"}, "question and problem ask two things (expected"),
        ({"options": [None, "CT"]}, "unusable options"),
    ],
)
def test_options_that_cannot_be_told_are_a_bad_row(change, reason):
    with pytest.raises(InputError) as error:
        only({**ASKED, "answer": "CT", **change})
    assert str(error.value).startswith(f"rows.json: row 0: {reason}") and str(error.value).isprintable()


def test_what_a_row_lacks_may_be_null_nan_or_blank():
    row = {**ASKED, "image_path": None, "modality": float("nan"), "option_A": "CT", "option_B": "MRI", "option_C": None}
    record = only({**row, "option_D": " ", "options": "", "solution": "", "answer": "A"})
    assert record["options"] == {"A": "CT", "B": "MRI"} and record["answer"] == "A" and record["modality"] is None


def test_our_own_name_comes_before_another_and_a_filled_one_before_a_blank():
    assert rename({"Image": "b", "image": "a"}) == {"image": "a"}
    assert rename({"image": " ", "image_path": "b"}) == {"image": "b"}
    assert rename({"answer": "CT", "Answer_label": "A"}) == {"answer": "CT"}


def test_names_are_told_in_any_case_and_punctuation():
    names = ["Image Path", "IMAGE-PATH", "imagePath", "Option A", "option_a", "A", "Question", "dataset", "caption", "x1"]
    assert [our_name(name) for name in names] == ["image"] * 3 + ["A"] * 3 + ["question"] + [None] * 3


def test_labels_lose_the_white_space_around_them():
    assert only({**ASKED, "answer": "yes", "modality": "MRI "})["modality"] == "MRI"


def test_a_question_with_options_in_its_text_needs_no_others():
    record = only({**ASKED, "question": "Is it? A)no, B)yes", "answer": "yes"})
    assert record["options"] == {"A": "no", "B": "yes"} and record["answer"] == "B"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"options": ["CT", "MRI"], "answer": "B", "gt_answer": "CT"}, "the solution names B and the answer A"),
        ({"options": ["CT", "MRI"], "answer": "CT", "answer_label": "B"}, "the solution names A and the answer B"),
        ({"A": "CT", "option_A": "X-ray", "B": "MRI", "answer": "A"}, "two columns have other texts for option A"),
        ({"options": ["CT", "MRI"], "A": "MRI", "B": "CT", "answer": "A"}, "the list of options and the column A have other texts"),
        ({"options": ["CT", "CT"], "answer": "CT"}, "answer 'CT' is two of its options"),
        ({"options": [float("nan"), "MRI"], "answer": "B"}, "option A is empty"),
        ({"question": ["What is it?"], "options": ["CT", "MRI"], "answer": "B"}, "question is not text"),
    ],
)
def test_a_row_that_says_two_things_is_a_bad_row(row, reason):
    with pytest.raises(InputError, match=f"rows.json: row 0: {reason}"):
        load(ASKED | {"image": "a.png"} | row)


def test_columns_that_say_one_thing_twice_are_a_row():
    row = {"options": ["CT", "MRI"], "A": "CT ", "B": "mri", "option_B": "MRI", "answer": "MRI", "answer_label": "B"}
    assert only(ASKED | row)["answer"] == "B"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "rest",
    ['"options": ["CT", "MRI"], "answer": "A", "answer": "B"', '"options": {"A": "CT", "A": "MRI", "B": "X-ray"}, "answer": "B"'],
)
def test_a_name_twice_in_a_row_of_json_is_a_bad_row(name, rest):
    good = json.dumps(ASKED | {"options": ["CT", "MRI"], "answer": "B"})
    odd = f'{{"image": "a.png", "question": "What is it?", {rest}}}'
    Path(name).write_text(f"[{good}, {odd}]" if name == "rows.json" else f"{good}\n{odd}\n")
    with pytest.raises(InputError, match=f"{name}: row 1.*'(answer|A)' is there twice .expected each name once"):
        load_questions(name)
    assert len(load_questions(name, on_bad_row="skip")) == 1


@pytest.mark.parametrize("options", ['{"A": "CT", "B": "MRI", "A": "X-ray"}', "{'A': 'CT', 'B': 'MRI', 'A': 'X-ray'}"])
def test_a_letter_twice_in_a_cell_of_options_is_a_bad_row(options):
    Path("rows.json").write_text(json.dumps([ASKED | {"options": options, "answer": "B"}]))
    with pytest.raises(InputError, match="rows.json: row 0.*'A' is there twice .expected each name once"):
        load_questions("rows.json")
