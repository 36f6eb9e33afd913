"""The training and test questions of a run, as `DataArguments` names them."""

import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from engine.command.settings import DataArguments
from engine.data.questions import QuestionSet, load_questions
from engine.data.sources import find_shards
from engine.data.starter.questions import build_starter_data
from engine.errors import InputError

logger = logging.getLogger(__name__)


def load_splits(data: DataArguments, starter_modalities: Collection[str] | None = None) -> tuple[QuestionSet, QuestionSet | None]:
    """(training questions, test questions or None where there are none to test on). Skipped rows are logged.

    `starter_modalities`: what to take of the starter data, where no other are named; None: all of it.
    """
    sources = data.dataset_name or [str(build_starter_data())]
    modalities = None if data.dataset_name else starter_modalities
    options = {"image_root": data.image_root, "on_bad_row": data.on_bad_row}
    train = load_questions(sources, split=data.dataset_train_split, modalities=modalities, **options)
    test = None
    if data.eval_limit and data.eval_dataset_name:
        test = load_questions(data.eval_dataset_name, split=data.dataset_test_split, **options)
    elif data.eval_limit and all(has_split(Path(source), data.dataset_test_split) for source in sources):
        test = load_questions(sources, split=data.dataset_test_split, modalities=modalities, **options)
    for line in train.skipped + (test.skipped if test else []):
        logger.warning("skipped: %s", line)
    if test and len(test) > data.eval_limit:
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: data.eval_limit]
        test = test.select(sorted(chosen.tolist()))
    return train, test


def has_split(path: Path, split: str) -> bool:
    """Whether `path` is a folder that holds several splits, this one among them."""
    saved = path / "dataset_dict.json"
    if saved.is_file():
        return split in json.loads(saved.read_text())["splits"]
    return any((path / f"{split}{suffix}").is_file() for suffix in (".json", ".jsonl")) or bool(find_shards(path, split))


def limit_prompts(
    questions: QuestionSet, prompt_of: Callable, measure: Callable, limit: int | None, on_bad_row: str
) -> QuestionSet:
    """The questions whose prompts have at most `limit` tokens, image tokens included; others are bad rows.

    `measure(messages, sizes)` counts a prompt's tokens; `sizes` are its images' (height, width) in pixels, or None for an upper
    bound. Images are opened only where the bound does not decide.
    """
    if limit is None:
        return questions
    kept, skipped = [], []
    for index in range(len(questions)):
        record = questions.record(index)
        messages = prompt_of(record | {"images": questions.images[index]})
        length = measure(messages, [None] * len(questions.images[index]))
        if length > limit:
            length = measure(messages, [image.size[::-1] for image in questions[index]["images"]])
        if length <= limit:
            kept.append(index)
            continue
        line = (
            f"{record['source']}: row {record['row']}: a prompt of {length} tokens (expected at most --max_prompt_length {limit}; "
        )
        line += "lower --max_pixels or raise it; rows count from 0)"
        if on_bad_row == "error":
            raise InputError(line)
        skipped.append(line)
    if not kept:
        raise InputError(f"every prompt is too long; the first: {skipped[0]}")
    for line in skipped:
        logger.warning("skipped: %s", line)
    fitting = questions.select(kept)
    fitting.skipped += skipped
    return fitting
