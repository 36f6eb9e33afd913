"""Which rows are trained on and which are held out, however the folder is named, and which of them a limit takes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from engine.command.settings import DataArguments
from engine.data.questions import load_questions
from engine.data.rows import evenly_spread
from engine.data.splits import has_split, load_splits, readable_prompts
from engine.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write(folder: str, **parts: int) -> str:
    """A folder with so many rows in each of its parts."""
    Path(folder).mkdir(exist_ok=True)
    Image.new("RGB", (8, 6)).save(f"{folder}/a.png")
    for part, count in parts.items():
        rows = [{"image": "a.png", "question": f"{part} {i}?", "answer": "yes"} for i in range(count)]
        Path(folder, f"{part}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("named", ["both", "both/", "./both", "../{here}/both", "{here!s}"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_folder_is_evaluated_on_its_held_out_rows_however_it_is_named(tmp_path, named, alone):
    write("both", train=5, test=3)
    name = str(tmp_path / "both") if named == "{here!s}" else named.format(here=tmp_path.name)
    train, test, _ = load_splits(DataArguments(dataset_name=name if alone else [name]))
    assert [record["source"].endswith("train.json") for record in train.records] == [True] * 5
    assert [record["source"].endswith("test.json") for record in test.records] == [True] * 3


def test_of_several_folders_those_with_held_out_rows_are_evaluated_on_and_the_others_named(caplog):
    data = DataArguments(dataset_name=[write("one", train=2), write("two", train=2, test=3)])
    train, test, _ = load_splits(data)
    assert len(train) == 4 and len(test) == 3
    assert "one: no split 'test', so that none of its questions is held out" in caplog.text and "two:" not in caplog.text
    assert load_splits(DataArguments(dataset_name=["one"])).test is None


def test_an_eval_limit_is_spread_over_the_held_out_rows():
    write("both", train=1, test=10)
    test = load_splits(DataArguments(dataset_name=["both"], eval_limit=4)).test
    assert [record["row"] for record in test.records] == [0, 2, 5, 7]


def test_one_modality_can_be_trained_on_and_all_be_tested():
    folder = write("both", train=2, test=2)
    for part in ("train", "test"):
        rows = [
            {"image": "a.png", "question": f"{i}?", "answer": "no", "modality": name} for i, name in enumerate(["CT", "MRI", "MRI"])
        ]
        Path(folder, f"{part}.json").write_text(json.dumps(rows))
    train, test, _ = load_splits(DataArguments(dataset_name=[folder]), train_modalities=["MRI"])
    assert [row["modality"] for row in train.records] == ["MRI"] * 2 and [row["modality"] for row in test.records] == [
        "CT",
        "MRI",
        "MRI",
    ]
    with pytest.raises(InputError, match="no row about X-Ray"):
        load_splits(DataArguments(dataset_name=[folder]), train_modalities=["X-Ray"])


def test_a_limit_is_spread_over_all_sources_and_first_takes_the_first():
    sources = [write("one", test=3) + "/test.json", write("two", test=5) + "/test.json"]
    places = [(record["source"][:3], record["row"]) for record in load_questions(sources, limit=4).records]
    assert places == [("one", 0), ("one", 2), ("two", 1), ("two", 3)]
    assert [record["row"] for record in load_questions(sources, first=4).records] == [0, 1, 2, 0]
    assert len(load_questions(sources, limit=99)) == 8


@pytest.mark.parametrize("count, limit, taken", [(5, None, 5), (5, 9, 5), (0, 3, 0), (7, 1, 1), (1000, 999, 999)])
def test_evenly_spread_takes_distinct_rows_in_order_from_the_first_on(count, limit, taken):
    chosen = evenly_spread(count, limit)
    assert len(chosen) == taken and chosen == sorted(set(chosen)) and chosen[:1] == [0][:taken]
    gaps = {after - before for before, after in zip(chosen, chosen[1:], strict=False)}
    assert len(gaps) <= 2 and (not gaps or max(gaps) - min(gaps) <= 1)


def test_a_missing_shard_of_the_test_split_is_an_error_and_not_the_lack_of_it():
    write("both", train=1)
    Path("both/test-00000-of-00002.parquet").touch()
    with pytest.raises(InputError, match="the shard test-00001-of-00002.parquet is missing"):
        load_splits(DataArguments(dataset_name=["both"]))


def test_a_damaged_index_of_saved_splits_is_one_line():
    Path("saved").mkdir()
    for text in ("{", "[]", "{}", '{"splits": 7}', "[" * 100_000):
        Path("saved/dataset_dict.json").write_text(text)
        with pytest.raises(InputError, match="^saved/dataset_dict.json: damaged data set: [^\n]*$"):
            has_split(Path("saved"), "test")


class Reader:
    """Reads a token a word, and twenty for an image unless it knows better."""

    def prompt_length(self, prompt, image_sizes):
        return len(prompt[0]["content"].split()) + sum(20 if size is None else size[0] for size in image_sizes)

    def own_token_in(self, prompt):
        return "<image>" if "<image>" in prompt[0]["content"] else None


def test_prompts_that_a_model_cannot_read_are_bad_rows():
    write("rows", train=0)
    questions = ["Is it?", "Is <image> it?", " ".join("Is it a tumour or something else ?".split() * 9), "Is it a tumour?"]
    rows = [{"image": "a.png", "question": question, "answer": "yes"} for question in questions]
    Path("rows/train.json").write_text(json.dumps(rows))
    loaded = load_questions("rows")

    def prompt_of(record):
        return [{"role": "user", "content": record["problem"]}]

    kept = readable_prompts(loaded, prompt_of, Reader(), "skip", limit=20)  # the image has 6, not 20
    assert [record["row"] for record in kept.records] == [0, 3]
    assert kept.skipped == [
        "rows/train.json: row 1: its text has <image> (expected no token that the model itself reads; rows count from 0)",
        "rows/train.json: row 2: a prompt of 82 tokens (expected at most --max_prompt_length 20; lower --max_pixels or raise it; "
        "rows count from 0)",
    ]
    assert len(readable_prompts(loaded, prompt_of, Reader(), "skip")) == 3
    with pytest.raises(InputError, match="^rows/train.json: row 1: its text has <image> "):
        readable_prompts(loaded, prompt_of, Reader(), "error")
    with pytest.raises(InputError, match="^no prompt can be read; the first: rows/train.json: row 0: a prompt of 12 tokens "):
        readable_prompts(loaded, prompt_of, Reader(), "skip", limit=1)


def test_strips_are_bad_rows():
    write("rows", train=3)
    Image.new("RGB", (1205, 6)).save("rows/strip.png")
    Image.new("RGB", (6, 1200)).save("rows/long.png")
    rows = [{"image": name, "question": "Is it?", "answer": "yes"} for name in ("strip.png", "long.png", "a.png")]
    Path("rows/train.json").write_text(json.dumps(rows))
    loaded = load_questions("rows", on_bad_row="skip")
    assert [record["row"] for record in loaded.records] == [1, 2]
    assert loaded.skipped[0].startswith("rows/train.json: row 0: image 'strip.png': a strip of 1205 x 6 pixels, ")
