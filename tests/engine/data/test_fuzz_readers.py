"""Ten thousand rows of question files and tables: no traceback, and what is accepted can be trained on."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.data.masked_questions import COLUMNS, load_masked_questions
from engine.data.options.answers import read_tagged
from engine.data.questions import load_questions
from engine.data.rows import BadRow
from engine.data.tables import read_csv
from engine.errors import InputError
from engine.tasks.multiple_choice import MultipleChoice
from tests.fuzz import bounded, joined

PIECES = ["A", "B", "C) ", "A) CT, B) MRI", " CT", "MRI", "\n", " ", ", ", "<answer>", "</answer>", "<answer> B </answer>", "x.png"]
PIECES += [
    "..",
    "/",
    "\\",
    "\x00",
    "\ud800",
    "Ａ",
    "́",
    '"',
    "'",
    ";",
    "\t",
    "|",
    "=1+1",
    "[",
    "]",
    "{",
    "nan",
    "1e999",
    "\ufeff",
    "🩻",
]
TEXTS = joined(PIECES, 6)
GOOD = {
    "image": ["x.png", ["x.png"], "sub/../x.png"],
    "problem": ["Which? A) CT, B) MRI", "Which?\nA) CT\nB) MRI"],
    "solution": ["<answer> B </answer>", "B", "MRI"],
    "question": ["Which?"],
    "options": [["CT", "MRI"], {"A": "CT", "B": "MRI"}],
    "answer": ["B", "MRI"],
    "option_A": ["CT"],
    "option_B": ["MRI"],
    "gt_answer": ["MRI"],
    "modality": ["MRI"],
    "A": ["CT"],
    "B": ["MRI"],
}
ODD = st.one_of(
    TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(TEXTS, max_size=3), st.just({"A": 1}), st.just([[]])
)
ROWS = st.dictionaries(st.sampled_from(sorted(GOOD)), st.integers(0, 5), max_size=8)
FILES = st.lists(st.tuples(ROWS, st.lists(ODD, min_size=3, max_size=3)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A root with one image and its mask."""
    root = tmp_path_factory.mktemp("fuzz")
    Image.new("RGB", (8, 6), "red").save(root / "x.png")
    for name, value in (("images", 90), ("masks", 255)):
        (root / f"train_{name}").mkdir()
        pixels = np.zeros((6, 8), np.uint8)
        pixels[1:4, 2:6] = value
        Image.fromarray(pixels).save(root / f"train_{name}" / "x.png")
    return root


def built(drawn) -> list[dict]:
    """Rows of which most cells are good, and some odd."""
    rows = []
    for choices, odd in drawn:
        rows.append({key: odd[i % 3] if i > 3 else GOOD[key][i % len(GOOD[key])] for key, i in choices.items()})
    return rows


def as_table(rows: list[dict], delimiter: str) -> str:
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["image"]
    writer = csv.DictWriter(text, columns, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


WRITERS = {
    "q.json": lambda rows: json.dumps(rows),
    "q.jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "odd.json": lambda rows: json.dumps({"data": rows}),
    "q.csv": lambda rows: as_table(rows, ","),
    "q.tsv": lambda rows: as_table(rows, "\t"),
    "semicolons.csv": lambda rows: as_table(rows, ";"),
}


@bounded(2500)  # files of one to eight rows
@given(FILES, st.sampled_from(sorted(WRITERS)), st.integers(0, 10_000), st.binary(max_size=2))
def test_fuzz_of_question_files(folder, drawn, name, place, damage):
    """Half of the files are whole, of the others some bytes are replaced or the end is missing."""
    content = WRITERS[name](built(drawn)).encode("utf-8", "surrogatepass")
    if place % 2:
        at = place % (len(content) + 1)
        content = content[:at] + damage + (content[at + 1 :] if damage else b"")
    path = folder / name
    path.write_bytes(content)
    try:
        questions = load_questions(path, on_bad_row="skip")
    except InputError as error:
        assert "\n" not in str(error)
        return
    task = MultipleChoice("medr1_train_think")
    for i in range(len(questions)):
        row = questions[i]
        assert row["images"] and row["answer"] in row["options"] and len(row["options"]) >= 2
        assert all(text.strip() for text in row["options"].values())
        assert read_tagged(task.target(row), row["options"]) == row["answer"]
        json.dumps([task.prompt(row), questions.record(i)]).encode()
        row["problem"].encode()


MASKED = {
    "image_path": ["train_masks/x.png", "train_images/x.png", "nowhere/x.png", "../x.png"],
    "split": ["train", "test"],
    "question": ["Where is it?"],
    "position": ["top left"],
    "answer": ["It is at the top left."],
}


@bounded(2500)
@given(FILES, st.lists(st.integers(0, 9), min_size=40, max_size=40), st.integers(0, 10_000), st.binary(max_size=2))
def test_fuzz_of_annotation_tables(folder, drawn, choices, place, damage):
    rest, rows = iter(choices * 8), []
    for _, odd in drawn:
        row = {}
        for column in COLUMNS:
            good, choice = MASKED.get(column, ["x"]), next(rest)
            row[column] = odd[choice % 3] if choice > 7 else good[choice % len(good) if choice > 4 else 0]
        rows.append(row)
    content = as_table(rows, ",").encode("utf-8", "surrogatepass")
    if place % 2:
        at = place % (len(content) + 1)
        content = content[:at] + damage + (content[at + 1 :] if damage else b"")
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "set.csv").write_bytes(content)
    try:
        found = load_masked_questions(folder, split=None, on_bad_row="skip")
    except InputError as error:
        assert "\n" not in str(error)
        return
    for i in range(len(found)):
        row = found[i]
        assert row["question"].strip() and row["answer"].strip()
        assert row["image"].size == row["mask"].size and np.asarray(row["mask"]).any()
        json.dumps(found.record(i)).encode()


@bounded()
@given(joined([*PIECES, "a", "b", ",", ",", "\n", "\n", "\r\n", '"'], 30))
def test_fuzz_of_tables(folder, text):
    path = folder / "table.csv"
    path.write_bytes(("a,b\n" + text).encode("utf-8", "surrogatepass"))
    try:
        rows = list(read_csv(path, ("a", "b"), ("a",)))
    except InputError as error:
        assert "\n" not in str(error)
        return
    for _, line, cells in rows:
        assert line >= 2 and (isinstance(cells, BadRow) or isinstance(cells["a"], str))
