"""Verdicts on a teacher's answers, and what supervised fine-tuning makes of rows with answers of their own."""

import pytest

from engine.chat_session import Reply
from engine.data.questions import QuestionSet
from engine.errors import InputError
from engine.tasks.completions.targets import check_own_answers, own_answer, own_thought_then_letter, taught_form
from engine.tasks.completions.verdicts import form_of, judge_answers

OPTIONS = {"A": "CT", "B": "MRI", "C": "X-Ray"}
RIGHT = "<think>White bones.</think>\n<answer> C </answer>"


@pytest.mark.parametrize(
    "text, reason, read",
    [
        (RIGHT, None, "C"),
        ("<think>White bones.</think><answer>X-Ray</answer>", None, "C"),
        ("<think>White bones.</think><answer>C) X-Ray</answer>", None, "C"),
        ("<think>Grey.</think><answer>B</answer>", "wrong", "B"),
        ("<think>Grey.</think><answer>A or C</answer>", "unreadable", None),
        ("<think>Grey.</think><answer>C) CT</answer>", "unreadable", None),
        ("<answer>C</answer>", "form", "C"),
        ("<think> </think><answer>C</answer>", "form", "C"),
        ("<think>White bones.</think>", "form", None),
        ("Sure! <think>White bones.</think><answer>C</answer>", "form", "C"),
        ("<think>a</think><answer>B</answer><answer>C</answer>", "form", "C"),
        ("<think>\ud83d</think><answer>C</answer>", "form", "C"),
        ("<think>White.<|im_end|></think><answer>C</answer>", "special token", None),
        ("", "no answer", None),
        ("  \n", "no answer", None),
    ],
)
def test_an_answer_is_kept_if_it_is_right_and_in_form(text, reason, read):
    (verdict,) = judge_answers(OPTIONS, "C", [Reply(text)], "think", 1, [])
    assert (verdict.reason, verdict.read) == (reason, read)


def test_without_thought_only_bare_answers_are_kept():
    replies = [Reply(RIGHT), Reply("<answer>C</answer>")]
    assert [verdict.reason for verdict in judge_answers(OPTIONS, "C", replies, "nothink", 1, [])] == ["form", None]


def test_of_a_question_the_first_right_answers_are_kept_once_each_also_over_several_rows():
    texts = [f"<think>{word}</think><answer>C</answer>" for word in ("one  two", "one two", "three", "four", "five")]
    kept: list[str] = []
    first = judge_answers(OPTIONS, "C", [*map(Reply, texts[:3]), None, Reply(texts[3], cut_off=True)], "think", 3, kept)
    assert [verdict.reason for verdict in first] == [None, "duplicate", None, "no answer", "cut off"]
    second = judge_answers(OPTIONS, "C", [Reply(texts[2]), Reply(texts[3]), Reply(texts[4])], "think", 3, kept)
    assert [verdict.reason for verdict in second] == ["duplicate", None, "surplus"]
    assert kept == [texts[0], texts[2], texts[3]]


def rows(*completions) -> QuestionSet:
    records = [
        {"source": "own.jsonl", "row": i, "options": OPTIONS, "answer": "C"} | ({"completion": text} if text else {})
        for i, text in enumerate(completions)
    ]
    return QuestionSet(records, [() for _ in records])


def test_a_row_is_taught_its_own_answer_and_others_their_letter():
    own, bare = rows(RIGHT, None).records
    assert own_answer(own) == RIGHT and own_answer(bare) == "<answer> C </answer>"
    assert own_thought_then_letter(own) == "White bones.\n\n<answer> C </answer>"
    assert own_thought_then_letter(bare) == "None\n\n<answer> C </answer>"
    assert taught_form(rows(RIGHT)) == "think" and taught_form(rows("<answer>C</answer>")) == "nothink"
    assert taught_form(rows(None, None)) is None and form_of("C") is None


@pytest.mark.parametrize(
    "second, message",
    [
        (None, "own.jsonl: row 1: no completion, which other rows have (expected one in each row, or in none;"),
        ("<answer>C</answer>", "row 1: its completion has the form nothink, others think (expected one form in all rows;"),
        ("<think>x</think><answer>A</answer>", "row 1: its completion answers A and the solution is C (expected "),
        ("It is C", "row 1: completion: form (expected `<think>...</think><answer>...</answer>` or"),
        ("<think>x</think><answer>?</answer>", "row 1: completion: unreadable (expected an answer that names one option"),
        ("<think><|image_pad|></think><answer>C</answer>", "row 1: completion: special token (expected text that no model reads"),
    ],
)
def test_an_answer_that_cannot_be_learnt_is_a_bad_row(second, message):
    with pytest.raises(InputError) as error:
        check_own_answers(rows(RIGHT, second), "error")
    assert message in str(error.value) and "\n" not in str(error.value)
    left = check_own_answers(rows(RIGHT, second), "skip")
    assert len(left) == 1 and message in left.skipped[0]


def test_rows_without_answers_of_their_own_are_all_kept():
    assert len(check_own_answers(rows(None, None), "error")) == 2
