"""The training and test questions of a run, as `DataArguments` names them, and those whose prompts a model can read."""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from engine.command.settings import DataArguments
from engine.data.formats.folders import files_of_split
from engine.data.questions import load_questions
from engine.data.rows import BadRow, BadRows, Rows, evenly_spread
from engine.data.sources import is_saved, saved_splits
from engine.data.starter.questions import build_starter_data
from engine.errors import InputError

logger = logging.getLogger(__name__)
Questions = TypeVar("Questions", bound=Rows)
Read = TypeVar("Read", bound=Rows, covariant=True)


class Splits(NamedTuple):
    """Checked rows to train on, and to evaluate on before and after (None: not at all); `on_bad_row`: error or skip."""

    train: Rows
    test: Rows | None
    on_bad_row: str = "error"


class Load(Protocol[Read]):
    """Reads one split of sources."""

    def __call__(self, sources: list[str], *, split: str) -> Read: ...


def load_splits(
    data: DataArguments, starter_modalities: Collection[str] | None = None, train_modalities: Collection[str] | None = None
) -> Splits:
    """The training questions and those to test on, where there are any. Skipped rows are logged.

    `starter_modalities`: the modalities to take where the starter data are used (no `--dataset_name`); None: all of them.
    `train_modalities`: those to train on, of whichever data; None: all that are taken.
    """
    modalities = None if data.dataset_name else starter_modalities
    load = partial(load_questions, image_root=data.image_root, on_bad_row=data.on_bad_row)
    return read_splits(
        data,
        build_starter_data,
        partial(load, modalities=train_modalities or modalities),
        partial(load, modalities=None if data.eval_dataset_name else modalities),
    )


def read_splits(
    data: DataArguments,
    starter: Callable[[], Path],
    load: Load[Rows],
    load_test: Load[Rows],
    holds: Callable[[Path, str], bool] | None = None,
) -> Splits:
    """What `data` names, by default the folder that `starter` makes, read by `load` to train on and by `load_test` to test on.

    `holds(folder, split)`: whether a source has a split of this name, by default `has_split`.
    """
    named = [data.dataset_name] if isinstance(data.dataset_name, str) else data.dataset_name  # a text where no flags were parsed
    sources = named or [str(starter())]
    train, test = load(sources, split=data.dataset_train_split), None
    if data.eval_limit and data.eval_dataset_name:
        test = load_test(data.eval_dataset_name, split=data.dataset_test_split)
    elif data.eval_limit:
        held_out = [source for source in sources if (holds or has_split)(Path(source), data.dataset_test_split)]
        if held_out:
            test = load_test(held_out, split=data.dataset_test_split)
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


class PromptReader(Protocol):
    """What of `engine.rollout.policy.Processor` tells whether a prompt can be read."""

    def prompt_length(self, prompt: list[dict], image_sizes: Sequence[tuple[int, int] | None]) -> int: ...

    def own_token_in(self, prompt: list[dict]) -> str | None: ...


def readable_prompts(
    questions: Questions,
    prompt_of: Callable[[dict], list[dict]],
    reader: PromptReader,
    on_bad_row: str,
    limit: int | None = None,
) -> Questions:
    """The questions whose prompts hold none of the model's own tokens and have at most `limit` tokens, image tokens included.

    Others are bad rows. Images are opened only where a bound on the tokens of any image does not decide.
    """
    kept, bad = [], BadRows(on_bad_row)
    for index in range(len(questions)):
        record, handles = questions.record(index), questions.handles[index]
        messages = prompt_of(record | {"images": handles})
        if token := reader.own_token_in(messages):
            bad.add(record["source"], record["row"], BadRow(f"its text has {token}", "no token that the model itself reads"))
            continue
        length = 0 if limit is None else reader.prompt_length(messages, [None] * len(handles))
        if limit is not None and length > limit:
            length = reader.prompt_length(messages, [image.size[::-1] for image in questions[index]["images"]])
        if limit is None or length <= limit:
            kept.append(index)
        else:
            expected = f"at most --max_prompt_length {limit}; lower --max_pixels or raise it"
            bad.add(record["source"], record["row"], BadRow(f"a prompt of {length} tokens", expected))
    skipped = bad.lines()
    if not kept:
        raise InputError(f"no prompt can be read; the first: {skipped[0]}")
    for line in skipped:
        logger.warning("skipped: %s", line)
    readable = questions.select(kept)
    readable.skipped += skipped
    return readable
