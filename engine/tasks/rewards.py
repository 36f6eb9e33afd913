"""Reward functions, called as TRL calls them, so that those written for TRL run unchanged.

A function gets `prompts` and `completions` as lists of messages, `completion_ids`, every column of the rows, `trainer_state`,
`log_metric(name, value)` and `log_extra(column, values)`; it may be asynchronous. It gives a number for each completion, or None
where it does not apply. Anything else ends the run with one line that names the function.

Letters: N completions, F functions.
"""

import asyncio
import inspect
import logging
import math
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from engine.errors import InputError
from engine.tasks.task import Reward

# Of a row: what is ours, or given by another name.
NOT_COLUMNS = {"index", "encoded", "prompt", "completion", "prompts", "completions", "completion_ids"}
NOT_COLUMNS |= {"trainer_state", "log_metric", "log_extra"}
# What a function may raise: sys.exit() in one of several processes would leave the others waiting.
FAILURES = (Exception, SystemExit, asyncio.CancelledError)
logger = logging.getLogger(__name__)


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """What a completion says: a text as it is, or the content of its messages."""
    if isinstance(completion, str):
        return completion
    return "".join(_content(message["content"]) for message in completion)


def _content(content: str | Sequence[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class RewardFunctions:
    """`names` are those of their metrics.

    `metrics`: what they logged, since this was last cleared; `extra`: columns of texts or numbers about the completions of the last
    call, a value for each.
    """

    def __init__(self, functions: Sequence[Reward]):
        self.functions = list(functions)
        names = [getattr(function, "__name__", type(function).__name__) for function in functions]
        numbers = [names[:i].count(name) + 1 for i, name in enumerate(names)]
        self.names = [name if number == 1 else f"{name}_{number}" for name, number in zip(names, numbers, strict=True)]
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.extra: dict[str, list] = {}
        self._warned = False

    def __call__(
        self, rows: Sequence[dict], texts: Sequence[str], completion_ids: list[list[int]], *, step: int, state: Any
    ) -> torch.Tensor:
        """The rewards (N, F) of N completions, NaN where a function gave None; `rows`: the row of each, `step`: for messages."""
        self.extra = {}
        names = {name: None for row in rows for name in row if name not in NOT_COLUMNS}  # a set in the order of the first row
        given = {name: [row.get(name) for row in rows] for name in names} | {
            "prompts": [row["prompt"] for row in rows],
            "completions": [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": completion_ids,
            "trainer_state": state,
            "log_metric": self._log_metric,
            "log_extra": self._log_extra,
        }
        found: list[Any] = []
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                found.append(function(**given))
            except FAILURES as error:
                raise _raised(name, error, step) from error
        self._await(found, step)
        columns = [_checked(name, values, len(texts), step) for name, values in zip(self.names, found, strict=True)]
        for column, values in self.extra.items():
            if len(values) != len(texts):
                raise InputError(f"step {step}: log_extra({column!r}) was given {len(values)} values for {len(texts)} completions")
        rewards = torch.stack(columns, 1)
        self._warn_of_unscored(rewards, step)
        return rewards

    def _await(self, found: list[Any], step: int) -> None:
        """Put what asynchronous functions give in the places of their awaitables; they wait side by side."""
        places = [i for i, values in enumerate(found) if inspect.isawaitable(values)]
        if not places:
            return

        async def one(name: str, values: Awaitable[Any]) -> Any:
            try:
                return await values
            except FAILURES as error:
                raise _raised(name, error, step) from error

        async def every() -> list[Any]:
            return await asyncio.gather(*(one(self.names[i], found[i]) for i in places))

        with ThreadPoolExecutor(1) as thread:  # in a notebook this thread has a loop already
            for i, values in zip(places, thread.submit(asyncio.run, every()).result(), strict=True):
                found[i] = values

    def _log_metric(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"log_metric({name!r}) was given {value}")
        self.metrics[str(name)].append(float(value))

    def _log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.extra.setdefault(str(column), []).extend(values)

    def _warn_of_unscored(self, rewards: torch.Tensor, step: int) -> None:
        unscored = int(rewards.isnan().all(1).sum())
        if unscored and not self._warned:
            self._warned = True
            logger.warning(
                "step %d: no reward function scored %d of %d answers; such answers teach nothing (said once)",
                step,
                unscored,
                len(rewards),
            )


def _raised(name: str, error: BaseException, step: int) -> InputError:
    """One line that names the function, what it raised and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())
    return InputError(f"step {step}: reward {name} raised {type(error).__name__}: {said} ({place.filename}, line {place.lineno})")


def _checked(name: str, values: Any, count: int, step: int) -> torch.Tensor:
    """(count,) float32, NaN for None; InputError for anything but `count` finite numbers or None."""
    expected = f"expected {count} numbers, one a completion, None where it does not apply"
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        raise InputError(f"step {step}: reward {name} gave {type(values).__name__} ({expected})")
    listed = list(values)
    if len(listed) != count:
        raise InputError(f"step {step}: reward {name} gave {len(listed)} values ({expected})")
    rewards = []
    for value in listed:
        try:
            number = torch.nan if value is None else torch.tensor(_number(value), dtype=torch.float32).item()
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise InputError(f"step {step}: reward {name} gave {str(value)[:40]!r} ({expected})") from None
        if value is not None and not math.isfinite(number):
            raise InputError(f"step {step}: reward {name} gave {value} ({expected})")
        rewards.append(number)
    return torch.tensor(rewards)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError
    return float(value)
