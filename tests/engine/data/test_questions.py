"""Every published data format loads, and every bad row or file is one line that says what and where."""

import gzip
import json
import os
import pickle
import re
from pathlib import Path

import pytest
from PIL import Image

from engine.data import image_check
from engine.data.formats.columns import as_question
from engine.data.images import ImageError
from engine.data.questions import check_question, load_questions
from engine.data.sources import Source
from engine.data.splits import has_split
from engine.errors import InputError

GOOD = {"image": "images/a.png", "problem": "What is it? A)CT, B)MRI", "solution": "<answer> B </answer>"}
KINDS = "a .json, .jsonl, .csv, .tsv, .tab, .parquet file of questions, a save_to_disk folder, or a folder made by a prepare recipe"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of images, the working directory of the test, and a cache of its own."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    for index, name in enumerate(("a.png", "b (1) & c.png")):
        Image.new("RGB", (8, 6), (40 * index, 0, 0)).save(f"images/{name}")
    whole = Path("images/a.png").read_bytes()
    Path("images/cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "data"


def write_rows(*rows, name: str = "train.json") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(json.dumps(rows))
    return name


def test_med_r1_rows(folder):
    row = {**GOOD, "image": "images/b (1) & c.png"}
    questions = load_questions(write_rows(GOOD, row))
    assert len(questions) == 2 and questions.skipped == []
    record = questions.record(1)
    assert record == {
        "image_id": str(folder / "images" / "b (1) & c.png"),
        "problem": "What is it? A)CT, B)MRI",
        "solution": "<answer> B </answer>",
        "answer": "B",
        "options": {"A": "CT", "B": "MRI"},
        "modality": None,
        "question_type": None,
        "row": 1,
        "source": "train.json",
    }
    whole = questions[1]
    (image,) = whole.pop("images")
    assert whole == record and image.mode == "RGB" and image.getpixel((0, 0)) == (40, 0, 0)


def test_medvlm_r1_rows():
    row = {
        "image": ["images/a.png"],
        "problem": "What is apparent?\nA) Hemorrhage\nB) Abscess, old",
        "solution": "B",
        "question": "What is apparent?",
        "options": ["Hemorrhage", "Abscess, old"],
        "answer": "Abscess, old",
        "dataset": "OmniMedVQA",
        "subset": "MR (Mag-netic Resonance Imaging)",
    }
    record = load_questions(write_rows(row)).record(0)
    assert record["answer"] == "B" and record["problem"] == row["problem"]
    assert record["options"] == {"A": "Hemorrhage", "B": "Abscess, old"}
    assert record["modality"] == "MR (Mag-netic Resonance Imaging)"


def test_options_that_only_a_list_holds_are_shown_in_the_problem():
    row = {**GOOD, "problem": "What is it?", "options": ["CT", "MRI"], "solution": "mri"}
    record = load_questions(write_rows(row)).record(0)
    assert record["problem"] == "What is it?\nA) CT\nB) MRI" and record["answer"] == "B"


@pytest.mark.parametrize(
    "change, answer, options",
    [
        ({"solution": "<think>not <answer>A</answer></think><answer>B</answer>"}, "B", ["CT", "MRI"]),  # read as an answer is
        ({"solution": "<ANSWER>B</ANSWER>"}, "B", ["CT", "MRI"]),
        ({"solution": "**B. MRI**"}, "B", ["CT", "MRI"]),
        ({"options": ["ct", "MRI."]}, "B", ["ct", "MRI."]),
        ({"problem": "Which?", "options": ["A: CT", "B: MRI"]}, "B", ["CT", "MRI"]),
        ({"problem": "What do (A) and (B) show?", "options": ["CT", "MRI"]}, "B", ["CT", "MRI"]),
        ({"problem": "Which? A)yes B)no", "options": ["yes", "no"]}, "B", ["yes", "no"]),
        ({"problem": "Q?\nA) CT\nB) MRI\n\nAnswer with the letter.", "options": ["CT", "MRI"]}, "B", ["CT", "MRI"]),
        ({"problem": "Q? " + ", ".join(f"{letter}) sign" for letter in "ABCDEFGHIJKL"), "solution": "L"}, "L", ["sign"] * 12),
    ],
)
def test_answers_and_options_in_other_forms(change, answer, options):
    row = {**GOOD, "solution": "B", **change}
    record = load_questions(write_rows(row)).record(0)
    assert record["answer"] == answer and list(record["options"].values()) == options
    lines = (
        ""
        if " A)" in row["problem"] or "\nA)" in row["problem"]
        else "\n" + "\n".join(f"{key}) {text}" for key, text in record["options"].items())
    )
    assert record["problem"] == row["problem"] + lines


HUATUO = {"image": ["images/a.png"], "question": "A)B)?", "options": ["A", "CT ", "B"], "answer": "B", "subset": "X-Ray"}


def test_rows_of_question_options_and_answer_become_medvlm_r1s_problem_and_letter():
    record = load_questions(write_rows(HUATUO)).record(0)
    assert record["problem"] == "A)B)?\nA) A\nB) CT \nC) B" and record["solution"] == record["answer"] == "C"
    assert record["options"] == {"A": "A", "B": "CT", "C": "B"} and record["modality"] == "X-Ray"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"answer": "D"}, "answer 'D' is not an option (expected one of A, B, C"),
        ({"answer": None}, "missing key 'solution' (expected the keys image, problem, solution"),
        ({"options": ["B"]}, "unusable options (expected a list of 2 to 26 texts"),
        ({"options": None, "question": "Which?"}, "no options (expected 'A)..., B)...' in the problem, or a list of options"),
    ],
)
def test_a_bad_answer_among_options_is_one_line(change, reason):
    with pytest.raises(InputError, match="^" + re.escape(f"train.json: row 1: {reason}; rows count from 0)") + "$"):
        load_questions(write_rows(HUATUO, {**HUATUO, **change}))


def test_modalities_are_chosen_before_the_limit_and_whatever_other_rows_are_like():
    names = ["MRI", "X-Ray", "MR (Mag-netic Resonance Imaging)", "CT(Computed Tomography)", "xray", "mri"]
    path = write_rows({"subset": "SLAKE"}, 7, *[{**GOOD, "modality": name} for name in names])
    questions = load_questions(path, modalities=["MRI"], limit=2)
    assert [questions.record(i)["row"] for i in range(len(questions))] == [2, 4]
    assert len(load_questions(path, modalities=["MRI", "CT", "X-Ray"])) == 6
    with pytest.raises(InputError, match=r"^train.json: no row about OCT or Fundus \(expected such a `modality` or `subset`\)$"):
        load_questions(path, modalities=["OCT", "Fundus"])


def test_json_lines_and_several_sources_with_a_limit():
    Path("b.jsonl").write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "solution": "A"}) + "\n")
    questions = load_questions([write_rows(GOOD), "b.jsonl"])
    assert [(row["source"], row["row"], row["answer"]) for row in map(questions.record, range(3))] == [
        ("train.json", 0, "B"),
        ("b.jsonl", 0, "B"),
        ("b.jsonl", 1, "A"),
    ]
    assert len(load_questions(["train.json", "b.jsonl"], limit=2)) == 2
    assert [questions.select([2, 0]).record(i)["answer"] for i in range(2)] == ["A", "B"]


def test_several_images_in_a_row():
    questions = load_questions(write_rows({**GOOD, "image": ["images/a.png", "images/b (1) & c.png"]}))
    assert len(questions[0]["images"]) == 2 and questions[0]["image_id"].count("|") == 1


@pytest.mark.parametrize(
    "name, modality, question_type",
    [
        ("Splits/modality/train/CT(Computed Tomography)_train.json", "CT(Computed Tomography)", None),
        ("OCT (Optical Coherence Tomography_test.json", "OCT (Optical Coherence Tomography", None),
        ("Splits/question_type/test/Lesion Grading_test.json", None, "Lesion Grading"),
        ("prompts/q_type/test/Other.json", None, "Other"),
        ("mine_train.json", None, None),
    ],
)
def test_published_file_names_say_what_their_rows_are(folder, name, modality, question_type):
    record = load_questions(write_rows(GOOD, name=name), image_root=folder).record(0)
    assert (record["modality"], record["question_type"]) == (modality, question_type)
    own = {**GOOD, "modality": "PET", "question_type": "Other"}
    record = load_questions(write_rows(own, name=name), image_root=folder).record(0)
    assert (record["modality"], record["question_type"]) == ("PET", "Other")


class Stored:
    """An image that is there."""

    key = "image"


def test_every_published_question_is_read_with_its_letter(published_rows):
    letter = re.compile(r"<answer> ([A-D]) </answer>|([A-D])")
    with gzip.open(published_rows, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    stored = Source("published", rows, Path(), {}, stored=[[Stored()]] * len(rows))
    for index, row in enumerate(rows):
        record, _ = check_question(index, as_question(row), stored)
        published = letter.fullmatch(row["solution"])
        assert record["answer"] == (published[1] or published[2]) and record["problem"] == row["problem"]
        assert row["problem"].rstrip().endswith(list(record["options"].values())[-1])
    assert len(rows) == 67_366


def test_the_mini_data_set_loads(mini_data):
    train, test = (load_questions(mini_data / f"omnimedvqa_{split}.json") for split in ("train", "test"))
    assert (len(train), len(test)) == (200, 45) and len({train.record(i)["modality"] for i in range(200)}) >= 5
    assert all(2 <= len(train.record(i)["options"]) <= 4 for i in range(200))


def save_dataset(name: str, splits: tuple[str, ...] = (), rows: int = 3) -> str:
    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageFeature

    columns = {"image": ["images/a.png"] * rows, "problem": [GOOD["problem"]] * rows, "solution": [GOOD["solution"]] * rows}
    dataset = Dataset.from_dict(columns).cast_column("image", ImageFeature())
    (DatasetDict(dict.fromkeys(splits, dataset)) if splits else dataset).save_to_disk(name)
    return name


def test_a_save_to_disk_folder_loads_without_its_image_files():
    save_dataset("CT_384")
    os.remove("images/a.png")
    questions = load_questions("CT_384")
    assert len(questions) == 3 and questions[2]["images"][0].size == (8, 6) and questions[2]["answer"] == "B"
    assert len({questions.record(i)["image_id"] for i in range(3)}) == 3
    assert pickle.loads(pickle.dumps(questions))[1]["images"][0].mode == "RGB"  # as a data loader's workers need


def test_a_dataset_dict_gives_the_split_asked_for():
    save_dataset("both", ("train", "test"))
    assert load_questions("both", split="test").record(0)["source"] == "both/test"
    with pytest.raises(InputError, match=r"^both: no split 'dev' \(expected one of train, test\)$"):
        load_questions("both", split="dev")


def test_a_save_to_disk_folder_may_name_files_instead(folder):
    from datasets import Dataset

    Dataset.from_list([GOOD]).save_to_disk("names")
    assert load_questions("names", image_root=folder)[0]["images"][0].size == (8, 6)
    with pytest.raises(InputError, match="^names: row 0: image 'images/a.png': no such image file"):
        load_questions("names")


def test_parquet_files_load_alone_and_as_the_shards_of_a_split(folder):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    os.makedirs("hub/data")
    image = {"bytes": Path("images/a.png").read_bytes(), "path": "a.png"}
    rows = [{**GOOD, "image": image}, {**GOOD, "image": image, "solution": "A"}]
    stored = Dataset.from_list(rows).cast_column("image", ImageFeature())
    for index in range(2):
        stored.select([index]).to_parquet(f"hub/data/test-0000{index}-of-00002.parquet")
    Dataset.from_list([{**HUATUO, "dataset": "OmniMedVQA"}]).to_parquet("names.parquet")
    shards = load_questions("hub", split="test")
    assert [shards[i]["answer"] for i in range(2)] == ["B", "A"] and shards[1]["images"][0].size == (8, 6)
    assert shards.record(0)["source"] == "hub/test"
    assert load_questions("names.parquet")[0]["images"][0].size == (8, 6)
    assert has_split(Path("hub"), "test") and not has_split(Path("hub"), "train")
    Path("cut.parquet").write_bytes(Path("names.parquet").read_bytes()[:200])
    with pytest.raises(InputError, match="^cut.parquet: damaged data set: [^\n]*$"):
        load_questions("cut.parquet")


def test_bad_stored_images_and_damaged_folders_are_errors():
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "problem": Value("string"), "solution": Value("string")})
    cut, whole = (Path(f"images/{name}").read_bytes() for name in ("cut.png", "a.png"))
    rows = [{**GOOD, "image": {"bytes": data, "path": None} if data else None} for data in (whole, cut, None)]
    Dataset.from_list(rows, features=features).save_to_disk("bad")
    skipped = load_questions("bad", on_bad_row="skip").skipped
    assert skipped[0].startswith("bad: row 1: image: truncated or damaged image: ") and len(skipped) == 2
    assert skipped[1].startswith("bad: row 2: image: no image is stored here (expected a whole PNG")
    for file in Path(save_dataset("damaged")).glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="^damaged: damaged data set: [^\n]*$"):
        load_questions("damaged")


BAD_ROWS = [
    ({"image": None}, "missing key 'image' (expected the keys image, problem, solution"),
    ({"problem": None}, "missing key 'problem' (expected the keys image, problem, solution"),
    ({"solution": None}, "missing key 'solution' (expected the keys image, problem, solution"),
    ({"problem": "  "}, "empty problem (expected problem to be text"),
    ({"problem": 7}, "problem is not text (expected problem to be text"),
    ({"solution": ""}, "empty solution (expected solution to be text"),
    ({"solution": "<answer> E </answer>"}, "answer 'E' is not an option (expected one of A, B"),
    ({"solution": "C"}, "answer 'C' is not an option (expected one of A, B"),
    ({"solution": "<answer></answer>"}, "answer '' is not an option (expected one of A, B"),
    ({"problem": "What is it?"}, "no options (expected 'A)..., B)...' in the problem, or a list of options"),
    ({"options": ["CT"]}, "unusable options (expected a list of 2 to 26 texts"),
    ({"options": "CT, MRI"}, "unusable options (expected a list of texts, or one text with | or ; or line breaks between them"),
    ({"options": ["x"] * 27}, "unusable options (expected a list of 2 to 26 texts"),
    (
        {"options": ["CT", "PET"]},
        "the problem shows 'A) CT, B) MRI' and the list of options has 'A) CT, B) PET' (expected the same",
    ),
    (
        {"options": ["MRI", "CT"]},
        "the problem shows 'A) CT, B) MRI' and the list of options has 'A) MRI, B) CT' (expected",
    ),
    ({"options": ["CT", "MRI", "PET"]}, "the problem shows 'A) CT, B) MRI' and the list of options has 'A) CT, B) MRI, C) PET'"),
    ({"problem": "Which sign? A) , B) Effusion", "solution": "A"}, "option A is empty (expected a text for each option"),
    ({"problem": "Which?", "options": ["", "Effusion"]}, "option A is empty (expected a text for each option"),
    ({"problem": "Which?", "options": ["x", " \u200b"]}, "option B is empty (expected a text for each option"),
    ({"answer": "A"}, "the solution names B and the answer A (expected the same of both"),
    ({"answer": "CT"}, "the solution names B and the answer A (expected the same of both"),
    ({"solution": "A or B"}, "answer 'A or B' is not an option (expected one of A, B"),
    ({"solution": "A) MRI"}, "answer 'A) MRI' is not an option (expected one of A, B"),
    ({"solution": "<answer>A</answer> <answer>A or B</answer>"}, "answer 'A or B' is not an option (expected one of A, B"),
    ({"image": []}, "unusable image (expected a path or a list of paths"),
    ({"image": {"bytes": "x"}}, "unusable image (expected a path or a list of paths"),
    (
        {"image": "images/gone.png"},
        "image 'images/gone.png': no such image file (expected a whole PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM file",
    ),
    ({"image": "images/a\0.png"}, "image 'images/a\\x00.png': no such image file (expected a whole PNG"),
    ({"image": "images/cut.png"}, "image 'images/cut.png': truncated or damaged image: "),
    ({"image": ["images/a.png", "images/cut.png"]}, "image 'images/cut.png': truncated or damaged image: "),
    ({"image": "../secret.png"}, "image path '../secret.png' leaves '"),
    ({"image": "images/../../x.png"}, "image path 'images/../../x.png' leaves '"),
    ({"image": "/etc/passwd"}, "image path '/etc/passwd' leaves '"),
]


@pytest.mark.parametrize("change, reason", BAD_ROWS)
def test_a_bad_row_is_one_line_that_names_file_row_and_reason(change, reason):
    row = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    path = write_rows(GOOD, GOOD, row)
    with pytest.raises(InputError) as error:
        load_questions(path)
    line = str(error.value)
    assert line.startswith(f"train.json: row 2: {reason}") and line.endswith("; rows count from 0)") and "\n" not in line
    kept = load_questions(path, on_bad_row="skip")
    assert kept.skipped == [line] and [kept.record(i)["row"] for i in range(len(kept))] == [0, 1]


def test_rows_that_are_no_objects_are_bad_rows():
    Path("a.jsonl").write_text(json.dumps(GOOD) + '\n{"image": \n[1]\n')
    skipped = load_questions("a.jsonl", on_bad_row="skip").skipped
    expected = "not a JSON object (expected an object with the keys image, problem, solution; rows count from 0)"
    assert skipped == [f"a.jsonl: row {row}: {expected}" for row in (1, 2)]


def test_skipped_rows_are_listed_in_row_order():
    path = write_rows({**GOOD, "image": "images/cut.png"}, {**GOOD, "solution": "E"}, {**GOOD, "image": "gone.png"}, GOOD)
    assert [line.split(":")[1] for line in load_questions(path, on_bad_row="skip").skipped] == [" row 0", " row 1", " row 2"]


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("a.json", "", f"a.json: the file is empty (expected {KINDS})"),
        ("a.json", "[]", f"a.json: no rows in it (expected {KINDS})"),
        ("a.jsonl", "\n", f"a.jsonl: the file is empty (expected {KINDS})"),
        ("a.json", "{'x'", "a.json: not JSON: "),
        ("a.json", "[" * 100_000, "a.json: not JSON: "),
        ("a.jsonl", "what\never\n", f"a.jsonl: no line of it is JSON (expected {KINDS})"),
        ("a.json", '{"rows": []}', f"a.json: a JSON dict, not an array of rows (expected {KINDS})"),
        ("a.xlsx", "PK", f"a.xlsx: unsupported kind of file '.xlsx' (expected {KINDS})"),
        ("a.json", b"\xff\xfe\x00", f"a.json: not UTF-8 text in line 1 (expected {KINDS})"),
        ("some/note.txt", "x", f"some: a folder without train.json or the like (expected {KINDS})"),
    ],
)
def test_an_unusable_file_is_one_line(name, content, line):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        load_questions(name.split("/")[0])
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_missing_source_is_one_line():
    with pytest.raises(InputError, match="^hub/CT_384: no such file or folder "):
        load_questions("hub/CT_384")
    with pytest.raises(InputError, match="^no data set given "):
        load_questions([])


def test_nothing_but_bad_rows_is_an_error_even_when_skipping():
    path = write_rows(*[{**GOOD, "image": f"gone{i}.png"} for i in range(3)])
    with pytest.raises(InputError, match="^all 3 rows are bad; the first: train.json: row 0: image 'gone0.png': no such image"):
        load_questions(path, on_bad_row="skip")


def test_images_that_passed_are_not_decoded_again_until_they_change(folder, monkeypatch):
    decoded = []

    def note(image):
        decoded.append(Path(image.key).name)
        return original(image)

    original = image_check._reason
    monkeypatch.setattr(image_check, "_reason", note)
    path = write_rows(GOOD, GOOD, {**GOOD, "image": "images/b (1) & c.png"})
    load_questions(path)
    assert sorted(decoded) == ["a.png", "b (1) & c.png"]  # each once, though a row repeats
    load_questions(path)
    assert len(decoded) == 2
    Path("images/a.png").write_bytes(Path("images/cut.png").read_bytes())
    with pytest.raises(InputError, match="row 0: image 'images/a.png': truncated"):
        load_questions(path)
    for file in (folder.parent / "cache" / "checked_images").iterdir():
        file.write_text("[1")  # a damaged memory is no memory
    assert len(load_questions(path, on_bad_row="skip")) == 1


def test_an_image_lost_after_the_check_is_an_error_of_its_own():
    questions = load_questions(write_rows(GOOD))
    os.remove("images/a.png")
    with pytest.raises(ImageError, match="images/a.png: no such image file"):
        questions[0]


def write_parquet(name: str, images: list, kind) -> str:
    from datasets import Dataset, Features, Value

    rows = {"images": images, "question": ["Is it?"] * len(images), "answer": ["yes"] * len(images)}
    features = Features({"images": kind, "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(name)
    return name


def test_images_without_hugging_faces_word_for_them_are_read_and_lists_of_them(folder):
    from datasets import List, Value

    data, name = Path("images/a.png").read_bytes(), "b (1) & c.png"
    other = Path("images", name).read_bytes()
    cell = {"bytes": Value("binary"), "path": Value("string")}
    cells = [{"bytes": data, "path": "a.png"}, {"bytes": other, "path": name}]
    stored = load_questions(write_parquet("a.parquet", cells, cell))
    assert [row["images"][0].getpixel((0, 0))[0] for row in stored] == [0, 40]
    assert load_questions(write_parquet("b.parquet", [data, other], Value("binary")))[1]["images"][0].getpixel((0, 0)) == (40, 0, 0)
    lists = load_questions(write_parquet("c.parquet", [cells, cells[1:], []], List(cell)), on_bad_row="skip")
    assert [len(lists[row]["images"]) for row in range(2)] == [2, 1] and lists[0]["images"][1].getpixel((0, 0)) == (40, 0, 0)
    assert lists.skipped == ["c.parquet: row 2: no image is stored here (expected at least one; rows count from 0)"]
    assert len({record["image_id"] for record in lists.records}) == 2
    assert load_questions(write_parquet("d.parquet", ["images/a.png"], Value("string")))[0]["images"][0].size == (8, 6)
