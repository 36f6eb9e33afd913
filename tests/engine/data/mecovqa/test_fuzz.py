"""Conversations of any kind: no traceback, and what is accepted can be trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.data.mecovqa.captions import load_captions
from engine.data.mecovqa.rows import load_mecovqa
from engine.data.mecovqa.samed2d import read_name
from engine.data.mecovqa.tags import SEG, read_answer, read_question
from engine.data.rows import BadRow
from engine.errors import InputError
from engine.tasks.mecovqa.task import MeCoVQATask
from tests.fuzz import bounded, joined

PIECES = [
    "<image>",
    "<image>\n",
    "<region>",
    "</region>",
    "<mask>",
    "</mask>",
    SEG,
    "x.png",
    "images/x",
    "m.png",
    "masks/m",
    " ",
    "\n",
]
PIECES += [
    "<region>m.png</region>",
    f"{SEG} <mask>m</mask>",
    "What is it?",
    "yes",
    "..",
    "/",
    "\\",
    "\x00",
    "\ud800",
    "🩻",
    "<",
    "</",
]
TEXTS = joined(PIECES, 7)
ODD = st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(TEXTS, max_size=2), st.just({"A": 1}))
GOOD_QUESTIONS = ["<image>\nWhat is it?", "Is <region>m.png</region> it?", "<image>\nSegment <region>masks/m</region> here"]
GOOD_ANSWERS = ["yes", f"{SEG} <mask>m.png</mask>", f"{SEG}<mask>m</mask> {SEG}<mask>masks/m.png</mask>", "A liver."]
QUESTIONS = st.one_of(st.sampled_from(GOOD_QUESTIONS), TEXTS, ODD)
ANSWERS = st.one_of(st.sampled_from(GOOD_ANSWERS), TEXTS, ODD)
TURNS = st.lists(st.tuples(QUESTIONS, ANSWERS, st.integers(0, 30)), min_size=1, max_size=3)
IMAGES = st.one_of(st.sampled_from(["x.png", "images/x", "x", "images\\x.png"]), ODD)
ITEMS = st.lists(st.tuples(TURNS, IMAGES, st.integers(0, 9), ODD), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    Image.new("RGB", (8, 6), "red").save(root / "images" / "x.png")
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:6] = 1
    for name in ("masks/m.png", "m.png"):
        Image.fromarray(mask).save(root / name)
    return root


def built(drawn) -> list:
    """Items of which most have the form of published ones."""
    items = []
    for turns, image, form, odd in drawn:
        if form == 9:
            items.append(odd)
            continue
        conversation = []
        for question, answer, speaker in turns:
            conversation.append({"from": "human" if speaker else odd, "value": question})
            conversation.append({"from": "gpt", "value": answer} if speaker != 1 else odd)
        items.append({"image": image, "conversations": conversation, "answer_type": odd})
        if form == 8:
            del items[-1]["image"]
    return items


@bounded(2500)
@given(ITEMS, st.integers(0, 10_000), st.binary(max_size=2))
def test_fuzz_of_conversations(folder, drawn, place, damage):
    """Half of the files are whole, of the others some bytes are replaced or the end is missing."""
    content = json.dumps(built(drawn)).encode("utf-8", "surrogatepass")
    if place % 2:
        at = place % (len(content) + 1)
        content = content[:at] + damage + (content[at + 1 :] if damage else b"")
    (folder / "q.json").write_bytes(content)
    try:
        rows = load_mecovqa(folder / "q.json", on_bad_row="skip")
    except InputError as error:
        assert "\n" not in str(error)
        return
    task = MeCoVQATask()
    for i in range(len(rows)):
        row = rows[i]
        json.dumps(rows.record(i))
        assert len(row["masks"]) == row["answer"].count(SEG) == len(row["mask_ids"]) and row["answer"].strip()
        assert (row["region"] is None) == (row["region_id"] is None) and len(row["images"]) <= 1
        for mask in (*row["masks"], *filter(None, [row["region"]])):
            assert mask.size == row["images"][0].size and set(np.unique(mask)) == {0, 255}
        content = task.prompt(row)[-1]["content"] if row["history"] == [] else row["question_parts"]
        assert sum(part["type"] == "region" for part in content) == (row["region"] is not None)
        for text in (row["question"], row["answer"]):
            assert not any(tag in text for tag in ("<mask>", "</mask>", "<region>", "</region>", "<image>"))
        assert all((folder / name).is_file() and ".." not in name for name in row["mask_ids"])
        images = [folder / name for name in ("images/x.png", "masks/m.png", "m.png")]
        assert not row["image_id"] or Path(row["image_id"]) in images


@bounded()
@given(joined(PIECES, 20))
def test_fuzz_of_tags(text):
    for read in (read_question, read_answer):
        try:
            found = read(text)
        except BadRow:
            continue
        words, named = (found.text, [found.region]) if read is read_question else found
        assert words.strip() and "<mask>" not in words and all(name in text for name in named if name is not None)
    read_name(text)


@bounded(2500)
@given(st.lists(st.dictionaries(st.sampled_from(["image", "caption", "source", "id"]), st.one_of(IMAGES, ODD)), max_size=4))
def test_fuzz_of_captions(folder, rows):
    path = folder / "c.jsonl"
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass"))
    try:
        found = load_captions(path, on_bad_row="skip")
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert all(row["images"] and row["answer"].strip() and "<image>" not in row["answer"] for row in found)
