"""Answers of a teacher are read from JSON lines, arrays and evaluation files; bad rows are one line."""

import json

import pytest

from engine.data.formats.answer_files import load_answers
from engine.data.questions import load_questions
from engine.errors import InputError
from tests.tiny_qwen import noise_image

QUESTION = {"image": "x.png", "problem": "Which? A)CT, B)MRI", "solution": "<answer> B </answer>", "modality": "MRI"}


@pytest.fixture
def folder(tmp_path):
    noise_image(0).save(tmp_path / "x.png")
    noise_image(1).save(tmp_path / "y.png")
    return tmp_path


def write(path, rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    "given, texts",
    [
        ({"completion": "a"}, ["a"]),
        ({"completions": ["a", "b"]}, ["a", "b"]),
        ({"completions": "a"}, ["a"]),
        ({"responses": ["a", ""]}, ["a", ""]),
        ({"model_output": "a"}, ["a"]),
        ({"completion": [{"role": "assistant", "content": "a"}]}, ["a"]),
        (
            {"completion": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            ["ab"],
        ),
        ({"completions": [[{"content": "a"}], [{"content": "b"}]]}, ["a", "b"]),
    ],
)
def test_a_row_has_one_answer_or_several(folder, given, texts):
    (row,) = load_answers(write(folder / "a.jsonl", [QUESTION | given])).records
    assert row["completions"] == texts and row["answer"] == "B" and row["modality"] == "MRI" and "completion" not in row


def test_arrays_and_tables_terms_are_read_too(folder):
    row = {"Image": "x.png", "question": "Which?", "choices": ["CT", "MRI"], "answer": "MRI", "completion": "a"}
    (folder / "a.json").write_text(json.dumps([row, QUESTION | {"completion": "b"}]))
    found = load_answers([str(folder / "a.json")])
    assert [(record["answer"], record["completions"]) for record in found.records] == [("B", ["a"]), ("B", ["b"])]


def test_evaluation_files_are_read_ours_and_the_published_ones(folder):
    two = "|".join(str(folder / name) for name in ("x.png", "y.png"))
    question = {"image": two, "problem": QUESTION["problem"], "solution": QUESTION["solution"]}
    result = {"question": question, "ground_truth": "B", "model_output": "said", "extracted_answer": None}
    ours = {"accuracy": 0.0, "results": [result | {"correct": False, "source": "s", "row": 7, "modality": "MRI"}], "shown": {}}
    published = {
        "accuracy": 0.0,
        "results": [result | {"question": question | {"image": ["x.png"], "subset": "CT(Computed Tomography)"}}],
    }
    (folder / "ours.json").write_text(json.dumps(ours))
    (folder / "published.json").write_text(json.dumps(published))
    first, second = load_answers([str(folder / "ours.json"), str(folder / "published.json")]).records
    assert first["completions"] == second["completions"] == ["said"]
    assert (first["modality"], second["modality"]) == ("MRI", "CT(Computed Tomography)")
    assert first["image_id"] == two and second["image_id"] == str(folder / "x.png")


@pytest.mark.parametrize(
    "row, message",
    [
        (QUESTION, "row 1: no answer (expected one in completion, or several in completions;"),
        (QUESTION | {"completion": None}, "row 1: no answer"),
        (QUESTION | {"completions": ["a", 3]}, "row 1: answer 1 in completions is not text (expected a text, or a list of texts;"),
        (QUESTION | {"completions": []}, "row 1: answer 0 in completions is not text"),
        (QUESTION | {"completion": "a", "image": "../gone.png"}, "row 1: image path '../gone.png' leaves"),
        (QUESTION | {"completion": "a", "image": "z.png"}, "row 1: image 'z.png': no such image file"),
        (QUESTION | {"completion": "a", "solution": "E"}, "row 1: answer 'E' is not an option"),
        ([1], "row 1: not a JSON object"),
    ],
)
def test_a_bad_row_is_one_line_or_left_out(folder, row, message):
    path = write(folder / "a.jsonl", [QUESTION | {"completion": "a"}, row])
    with pytest.raises(InputError) as error:
        load_answers(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    found = load_answers(path, on_bad_row="skip")
    assert len(found) == 1 and message in found.skipped[0]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "image,completion", "unsupported kind of file '.csv' (expected a .json or .jsonl file of answers"),
        ("a.json", "{}", "a JSON dict, not an array of rows"),
        ("a.json", '{"results": []}', "no rows in it"),
        ("a.json", '{"detailed_results": [{"model_output": "a"}]}', "a JSON dict, not an array of rows"),
        ("a.jsonl", "nothing", "no line of it is JSON"),
    ],
)
def test_what_is_no_file_of_answers_is_one_line(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(InputError) as error:
        load_answers(str(folder / name))
    assert message in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        load_answers(str(folder / "gone.jsonl"))


def test_a_question_carries_its_own_answer_or_thinking(folder):
    rows = [QUESTION | {"completion": " <answer>B</answer> "}, QUESTION | {"thinking": "<think>Grey.</think>"}, QUESTION]
    found = load_questions(write(folder / "own.jsonl", rows)).records
    assert [row.get("completion") for row in found] == ["<answer>B</answer>", "<think>Grey.</think><answer> B </answer>", None]
