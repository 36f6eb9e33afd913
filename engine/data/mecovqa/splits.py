"""The training and test rows of a run of Uni-MedVLM, as `DataArguments` names them; by default the starter data."""

from collections.abc import Collection
from functools import partial
from pathlib import Path

from engine.command.settings import DataArguments
from engine.data.mecovqa.captions import file_of_captions, load_captions
from engine.data.mecovqa.rows import load_mecovqa, split_files
from engine.data.rows import Rows
from engine.data.splits import Splits, read_splits
from engine.data.starter.unimed import build_starter_unimed
from engine.errors import InputError


def load_mecovqa_splits(data: DataArguments, kinds: Collection[str] | None = None) -> Splits:
    """The questions of these kinds to train on, and to test on where a source is a folder that holds some.

    A `data.dataset_name` is a file or a folder with train/ and test/, see `load_mecovqa`.
    """
    load = partial(load_mecovqa, kinds=kinds, image_root=data.image_root, on_bad_row=data.on_bad_row)
    return read_splits(data, build_starter_unimed, load, load, _has_questions)


def load_reasoning_splits(data: DataArguments) -> Splits:
    """Of the questions in words the closed ones, whose answers are right or wrong, and those for masks."""
    splits = load_mecovqa_splits(data)
    return splits._replace(train=_checkable(splits.train), test=splits.test and _checkable(splits.test))


def _checkable(rows: Rows) -> Rows:
    return rows.select([i for i in range(len(rows)) if rows.record(i)["answer_type"] in ("closed", None)])


def load_caption_splits(data: DataArguments) -> Splits:
    """The captions to train on, and to test on where a source is a folder that has captions_test.jsonl."""
    load = partial(load_captions, image_root=data.image_root, on_bad_row=data.on_bad_row)
    return read_splits(data, build_starter_unimed, load, load, _has_captions)


def _has_questions(path: Path, split: str) -> bool:
    try:
        return path.is_dir() and bool(split_files(path, split))
    except InputError:
        return False


def _has_captions(path: Path, split: str) -> bool:
    return path.is_dir() and file_of_captions(path, split).exists()
