"""What supervised fine-tuning teaches where rows have answers of their own (`completion`, `thinking`): these, reasoning and all."""

from typing import TypeVar

from engine.data.rows import BadRow, BadRows, Rows
from engine.errors import InputError
from engine.tasks.completions.verdicts import FORMS, form_of, reasoning_of, why_unusable
from engine.tasks.multiple_choice import letter

Questions = TypeVar("Questions", bound=Rows)
TEMPLATES = {"think": "medr1_train_think", "nothink": "medr1_train_nothink"}  # what asks for an answer of each form
EXPLAINED = {
    "form": "`<think>...</think><answer>...</answer>` or `<answer>...</answer>`",
    "wrong": "an answer that is the solution's",
    "unreadable": "an answer that names one option",
    "special token": "text that no model reads as its own tokens",
}


def own_answer(row: dict) -> str:
    """The row's own answer, or else the letter in its tags."""
    return row.get("completion") or letter(row)


def own_thought_then_letter(row: dict) -> str:
    """As Med-R1's fine-tuning writes a target: its `thinking`, or the word None where there is none, and the letter."""
    return f"{reasoning_of(row.get('completion', '')) or None}\n\n{letter(row)}"


def taught_form(rows: Rows) -> str | None:
    """The form of the answers that the rows have of their own, by the first of them; None where none has any."""
    completions = (record.get("completion") for record in rows.records)
    return next((form for text in completions if text and (form := form_of(text))), None)


def check_own_answers(rows: Questions, on_bad_row: str) -> Questions:
    """The rows whose own answers can be learnt: right, all of one form, and each row has one. All rows where none has any.

    Others are bad rows: InputError, or by `on_bad_row` left out and listed in `skipped`.
    """
    if not any(record.get("completion") for record in rows.records):
        return rows
    form, kept, bad = taught_form(rows), [], BadRows(on_bad_row)
    for index, record in enumerate(rows.records):
        if (why := _objection(record, form)) is None:
            kept.append(index)
        else:
            bad.add(record["source"], record["row"], why)
    if not kept:
        raise InputError(f"no row has an answer that can be learnt; the first: {bad.lines()[0]}")
    chosen = rows.select(kept)
    chosen.skipped += bad.lines()
    return chosen


def _objection(record: dict, form: str | None) -> BadRow | None:
    """Why the row's answer cannot be learnt beside others of that form."""
    text = record.get("completion")
    if not text:
        return BadRow("no completion, which other rows have", "one in each row, or in none")
    own = form_of(text)
    if own and own != form:
        return BadRow(f"its completion has the form {own}, others {form}", "one form in all rows")
    reason, read = why_unusable(text, record["options"], record["answer"], form or FORMS[0])
    if reason is None:
        return None
    said = f"its completion answers {read} and the solution is {record['answer']}" if reason == "wrong" else f"completion: {reason}"
    return BadRow(said, EXPLAINED[reason])
