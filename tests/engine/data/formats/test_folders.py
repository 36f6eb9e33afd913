"""What a split is in a folder: one file, or all of its shards; everything else is an error that says which file."""

from pathlib import Path

import pytest

from engine.data.formats.folders import files_of_split
from engine.data.questions import load_questions
from engine.errors import InputError


def found(*names: str, split: str = "train") -> list[str]:
    for name in names:
        Path("set", name).parent.mkdir(parents=True, exist_ok=True)
        Path("set", name).touch()
    return [path.relative_to("set").as_posix() for path in files_of_split(Path("set"), split)]


@pytest.mark.parametrize(
    "names, taken",
    [
        (["train.parquet", "test.parquet"], ["train.parquet"]),
        (["data/train.parquet"], ["data/train.parquet"]),
        (["train.jsonl.gz", "._train.jsonl.gz", ".DS_Store"], ["train.jsonl.gz"]),
        (["train.TSV"], ["train.TSV"]),
        (
            ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet"],
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ),
        (
            ["train-00000-of-00002-0a1b.parquet", "data/train-00001-of-00002-9f.parquet"],
            ["train-00000-of-00002-0a1b.parquet", "data/train-00001-of-00002-9f.parquet"],
        ),
        (["train-1-of-2.parquet", "train-2-of-2.parquet"], ["train-1-of-2.parquet", "train-2-of-2.parquet"]),
        (["train-clean-00000-of-00001.parquet", "training.json", "train.txt"], []),
        (
            ["train-9.parquet", "train-10.parquet", *(f"train-{i}.parquet" for i in range(9))],
            [f"train-{i}.parquet" for i in range(11)],
        ),
    ],
)
def test_the_files_of_a_split(names, taken):
    assert found(*names) == taken


@pytest.mark.parametrize(
    "names, said",
    [
        (["train-00000-of-00002.parquet"], "the shard train-00001-of-00002.parquet is missing (expected all of 2; 1 are there)"),
        (["train-00002-of-00003.parquet"], "the shard train-00001-of-00003.parquet is missing"),
        (["train-0.parquet", "train-2.parquet"], "the shard train-1.parquet is missing"),
        (
            ["train-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"],
            "train-00000-of-00001.parquet and data/train-00000-of-00001.parquet are one shard of 'train' (expected each once",
        ),
        (["train-00000-of-00001-aa.parquet", "train-00000-of-00001-bb.parquet"], "are one shard of 'train'"),
        (["train-00000-of-00001.parquet", "train-00001-of-00002.parquet"], "shards of 'train' of more than one division"),
        (
            ["train.json", "train-00000-of-00001.parquet"],
            "train.json and train-00000-of-00001.parquet could each be the split 'train'",
        ),
        (["train.json", "train.csv"], "train.csv and train.json could each be the split 'train'"),
        (["train.json", "train.json.gz"], "could each be the split 'train'"),
    ],
)
def test_a_split_that_cannot_be_told_is_one_line(names, said):
    with pytest.raises(InputError) as error:
        found(*names)
    assert said in str(error.value) and str(error.value).startswith("set: ") and "\n" not in str(error.value)


def test_a_folder_without_the_split_names_a_file_that_it_holds():
    found("questions.csv")
    with pytest.raises(InputError, match="set: a folder without train.json or the like .*it holds questions.csv: name the file"):
        load_questions("set")
