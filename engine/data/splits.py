"""The training and test questions of a run, as `DataArguments` names them, and those whose prompts are short enough."""

import json
import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

from engine.command.settings import DataArguments
from engine.data.questions import load_questions
from engine.data.rows import BadRow, BadRows, Rows
from engine.data.sources import find_shards
from engine.data.starter.questions import build_starter_data
from engine.errors import InputError

logger = logging.getLogger(__name__)


class Splits(NamedTuple):
    """Checked rows to train on, and to evaluate on before and after (None: not at all); `on_bad_row`: error or skip."""

    train: Rows
    test: Rows | None
    on_bad_row: str = "error"


def load_splits(data: DataArguments, starter_modalities: Collection[str] | None = None) -> Splits:
    """The training questions and those to test on, where there are any. Skipped rows are logged.

    `starter_modalities`: the modalities to take where the starter data are used (no `--dataset_name`); None: all of them.
    """
    sources = data.dataset_name or [str(build_starter_data())]
    modalities = None if data.dataset_name else starter_modalities
    load = partial(load_questions, image_root=data.image_root, on_bad_row=data.on_bad_row)
    train = load(sources, split=data.dataset_train_split, modalities=modalities)
    test = None
    if data.eval_limit and data.eval_dataset_name:
        test = load(data.eval_dataset_name, split=data.dataset_test_split)
    elif data.eval_limit and all(has_split(Path(source), data.dataset_test_split) for source in sources):
        test = load(sources, split=data.dataset_test_split, modalities=modalities)
    for line in train.skipped + (test.skipped if test else []):
        logger.warning("skipped: %s", line)
    if test and len(test) > data.eval_limit:
        import torch  # here: the flags are read before torch is needed

        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: data.eval_limit]
        test = test.select(sorted(chosen.tolist()))
    return Splits(train, test, data.on_bad_row)


def has_split(path: Path, split: str) -> bool:
    """Whether `path` is a folder that holds several splits, this one among them."""
    saved = path / "dataset_dict.json"
    if saved.is_file():
        return split in json.loads(saved.read_text(encoding="utf-8"))["splits"]
    return any((path / f"{split}{suffix}").is_file() for suffix in (".json", ".jsonl")) or bool(find_shards(path, split))


def limit_prompts(
    questions: Rows,
    prompt_of: Callable[[dict], list[dict]],
    measure: Callable[[list[dict], list], int],
    limit: int | None,
    on_bad_row: str,
) -> Rows:
    """The questions whose prompts have at most `limit` tokens, image tokens included; others are bad rows.

    `measure(messages, sizes)` counts a prompt's tokens; `sizes` are its images' (height, width) in pixels, or None for an upper
    bound. Images are opened only where the bound does not decide.
    """
    if limit is None:
        return questions
    kept, bad = [], BadRows(on_bad_row)
    for index in range(len(questions)):
        record = questions.record(index)
        messages = prompt_of(record | {"images": questions.handles[index]})
        length = measure(messages, [None] * len(questions.handles[index]))
        if length > limit:
            length = measure(messages, [image.size[::-1] for image in questions[index]["images"]])
        if length <= limit:
            kept.append(index)
        else:
            expected = f"at most --max_prompt_length {limit}; lower --max_pixels or raise it"
            bad.add(record["source"], record["row"], BadRow(f"a prompt of {length} tokens", expected))
    skipped = bad.lines()
    if not kept:
        raise InputError(f"every prompt is too long; the first: {skipped[0]}")
    for line in skipped:
        logger.warning("skipped: %s", line)
    fitting = questions.select(kept)
    fitting.skipped += skipped
    return fitting
