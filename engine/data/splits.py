"""The training and test questions of a run, as `DataArguments` names them, and those whose prompts are short enough."""

import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

from engine.command.settings import DataArguments
from engine.data.formats.folders import files_of_split
from engine.data.questions import load_questions
from engine.data.rows import BadRow, BadRows, Rows, evenly_spread
from engine.data.sources import is_saved, saved_splits
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
    named = [data.dataset_name] if isinstance(data.dataset_name, str) else data.dataset_name  # a text where no flags were parsed
    sources = named or [str(build_starter_data())]
    modalities = None if data.dataset_name else starter_modalities
    load = partial(load_questions, image_root=data.image_root, on_bad_row=data.on_bad_row)
    train = load(sources, split=data.dataset_train_split, modalities=modalities)
    test = None
    if data.eval_limit and data.eval_dataset_name:
        test = load(data.eval_dataset_name, split=data.dataset_test_split)
    elif data.eval_limit:
        held_out = [source for source in sources if has_split(Path(source), data.dataset_test_split)]
        if held_out:
            test = load(held_out, split=data.dataset_test_split, modalities=modalities)
        for source in sources:
            if source not in held_out:
                logger.warning("%s: no split %r, so that none of its questions is held out", source, data.dataset_test_split)
    for line in train.skipped + (test.skipped if test else []):
        logger.warning("skipped: %s", line)
    if test:
        test = test.select(evenly_spread(len(test), data.eval_limit))
    return Splits(train, test, data.on_bad_row)


def has_split(path: Path, split: str) -> bool:
    """Whether `path` is a folder that holds several splits, this one among them."""
    if not path.is_dir():
        return False
    if is_saved(path):
        return split in saved_splits(path)
    return bool(files_of_split(path, split))


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
