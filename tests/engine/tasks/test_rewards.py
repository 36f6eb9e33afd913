"""Reward functions get what TRL gives them, and what they give is checked."""

import asyncio
import sys

import numpy as np
import pytest
import torch
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from engine.errors import InputError
from engine.tasks.multiple_choice import accuracy_reward, named
from engine.tasks.rewards import RewardFunctions, text_of

ROWS = [{"prompt": [{"role": "user", "content": "?"}], "index": i, "answer": "AB"[i % 2], "images": [i]} for i in range(4)]
TEXTS = ["<think>x</think>A", "B", "CC", "DDD"]
IDS = [[1] * len(text) for text in TEXTS]


def rewards_of(*functions, step=1, state=None):
    return RewardFunctions(functions)(ROWS, TEXTS, IDS, step=step, state=state)


def test_the_text_of_a_completion_in_each_of_its_forms():
    assert text_of("yes") == text_of([{"role": "assistant", "content": "yes"}]) == "yes"
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]}]) == "yes"


def test_trls_own_rewards_run_unchanged():
    rewards = rewards_of(think_format_reward, get_soft_overlong_punishment(10, 8))
    assert rewards.tolist() == [[1, -1], [0, 0], [0, 0], [0, pytest.approx(-1 / 8)]]


def test_functions_get_what_trl_gives():
    seen = {}

    def watching(prompts, completions, completion_ids, answer, trainer_state, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids, answer=answer, state=trainer_state)
        return [0.0] * len(completions)

    rewards_of(watching, state="the trainer's")
    assert seen["prompts"] == [row["prompt"] for row in ROWS]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert (seen["ids"], seen["answer"], seen["images"]) == (IDS, ["A", "B", "A", "B"], [[0], [1], [2], [3]])
    assert seen["state"] == "the trainer's" and "index" not in seen


def test_our_own_rewards_take_messages_and_texts():
    reward, options = named("accuracy", accuracy_reward), [{"A": "CT", "B": "MRI"}] * 2
    texts = ["<answer>A</answer>", "<answer>A</answer>"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, messages):
        assert reward(prompts=None, completions=completions, answer=["A", "B"], options=options) == [1, 0]


def test_asynchronous_rewards_wait_side_by_side():
    async def first(completions, **columns):
        started.set()
        return [1.0] * len(completions)

    async def second(completions, **columns):
        await asyncio.wait_for(started.wait(), 10)
        return [None] * len(completions)

    started = asyncio.Event()
    assert rewards_of(second, first)[:, 1].tolist() == [1] * 4


def test_what_functions_log_is_kept():
    functions = RewardFunctions([lambda completions, log_metric, log_extra, **columns: logging(completions, log_metric, log_extra)])

    def logging(completions, log_metric, log_extra):
        log_metric("length", 3)
        log_extra("first", [text_of(answer)[0] for answer in completions])
        return [1] * len(completions)

    for _ in range(2):
        functions(ROWS, TEXTS, IDS, step=1, state=None)
    assert functions.metrics == {"length": [3.0, 3.0]} and functions.extra == {"first": ["<", "B", "C", "D"]}


@pytest.mark.parametrize("values", [np.arange(4.0), torch.arange(4), (float(i) for i in range(4)), [0, True, np.float32(2), 3.0]])
def test_numbers_come_in_any_sequence(values):
    assert rewards_of(lambda **columns: values)[:, 0].tolist() == [0, 1, 2, 3]


def test_none_for_some_and_for_all():
    rewards = rewards_of(lambda **columns: [1.0, None, None, 2.0], lambda **columns: [None] * 4)
    assert rewards.isnan().tolist() == [[False, True], [True, True], [True, True], [False, True]]


def test_unscored_answers_are_said_once(caplog):
    functions = RewardFunctions([lambda **columns: [None, 1.0, 1.0, None]])
    for step in (3, 4):
        functions(ROWS, TEXTS, IDS, step=step, state=None)
    assert [record.getMessage() for record in caplog.records] == [
        "step 3: no reward function scored 2 of 4 answers; such answers teach nothing (said once)"
    ]


NUMBERS = r" \(expected 4 numbers, one a completion, None where it does not apply\)"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "NoneType" + NUMBERS),
        (1.0, "float" + NUMBERS),
        ("1234", "str" + NUMBERS),
        ({1: 1, 2: 2, 3: 3, 4: 4}, "dict" + NUMBERS),
        ([1.0] * 3, "3 values" + NUMBERS),
        ([], "0 values" + NUMBERS),
        ([1.0, 2.0, float("nan"), 3.0], "nan" + NUMBERS),
        ([1.0, 2.0, float("-inf"), 3.0], "-inf" + NUMBERS),
        ([1.0, 2.0, 1e300, 3.0], r"1e\+300" + NUMBERS),
        ([1.0, 2.0, 10**400, 3.0], "'10000000000" + "0*'" + NUMBERS),
        ([1.0, 2.0, "3", 3.0], "'3'" + NUMBERS),
        ([1.0, 2.0, [3.0], 3.0], r"'\[3.0\]'" + NUMBERS),
        (torch.ones(4, 2), r"'tensor\(\[1., 1.\]\)'" + NUMBERS),
    ],
)
def test_anything_but_numbers_is_one_line(given, said):
    def scoring(**columns):
        return given

    with pytest.raises(InputError, match=f"^step 3: reward scoring gave {said}$"):
        rewards_of(scoring, step=3)


def test_a_function_that_ends_the_process_is_one_line_too():
    """Its exit code is a success's, and other processes would wait for it."""

    def leaving(completions, **columns):
        sys.exit(0)

    async def cancelled(completions, **columns):
        raise asyncio.CancelledError("timeout")

    with pytest.raises(InputError, match=r"reward leaving raised SystemExit: 0 \(.*test_rewards.py, line \d+\)$"):
        rewards_of(leaving)
    with pytest.raises(InputError, match=r"reward cancelled raised CancelledError: timeout \(.*test_rewards.py, line \d+\)$"):
        rewards_of(cancelled)


def test_a_function_that_raises_is_one_line_that_says_where():
    def breaking(completions, **columns):
        raise KeyError("a\nb")

    async def breaking_later(completions, **columns):
        return [1 / 0]

    with pytest.raises(InputError, match=r"^step 3: reward breaking raised KeyError: 'a\\nb' \(.*test_rewards.py, line \d+\)$"):
        rewards_of(breaking, step=3)
    with pytest.raises(
        InputError, match=r"^step 1: reward breaking_later raised ZeroDivisionError: .*test_rewards.py, line \d+\)$"
    ):
        rewards_of(breaking_later)
    with pytest.raises(InputError, match=r"reward needing raised TypeError: .* missing 1 required .*'absent'"):
        rewards_of(named("needing", lambda prompts, completions, absent, **columns: []))


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (lambda log_metric, log_extra: log_metric("m", float("nan")), r"raised ValueError: log_metric\('m'\) was given nan"),
        (lambda log_metric, log_extra: log_extra("c", [1]), r"log_extra\('c'\) was given 1 values for 4 completions"),
    ],
)
def test_what_cannot_be_logged_is_one_line(log, said):
    def scoring(completions, log_metric, log_extra, **columns):
        log(log_metric, log_extra)
        return [0] * len(completions)

    with pytest.raises(InputError, match=said):
        rewards_of(scoring)


def test_two_functions_of_one_name_have_metrics_of_their_own():
    functions = RewardFunctions([get_soft_overlong_punishment(10, 8), get_soft_overlong_punishment(20, 8), think_format_reward])
    name = "soft_overlong_punishment_reward"
    assert functions.names == [name, f"{name}_2", "think_format_reward"]
