"""Which of a teacher's answers are worth learning: right by our reader of answers, in form, whole, and no two alike.

form       think: `<think>...</think><answer>...</answer>`, with something thought; nothink: `<answer>...</answer>` alone
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.chat_session import Reply
from engine.data.options.answers import read_tagged
from engine.tasks.multiple_choice import format_reward, format_reward_nothink

FORMS = ("think", "nothink")
# Why an answer is not kept, in the order in which it is looked at.
REASONS = {
    "no answer": "the teacher gave none, or none that is text",
    "cut off": "not at its end at --max_new_tokens",
    "special token": "has a token that chat models read as such, as <|im_end|>",
    "form": "not in the form that is asked for",
    "unreadable": "its <answer> names no option, or more than one",
    "wrong": "its <answer> names another option than the solution",
    "duplicate": "the question has the same one already",
    "surplus": "the question has --per_question already",
}
SPECIAL = re.compile(r"<\|[^\s<>|]{1,40}\|>")


@dataclass(frozen=True)
class Verdict:
    """An answer to a question. `reason`: a key of REASONS, None where it is kept. `read`: the letter that it names, if any."""

    text: str | None
    reason: str | None
    read: str | None = None


def form_of(text: str) -> str | None:
    """Which of FORMS a text has."""
    if format_reward_nothink([], [text])[0]:
        return "nothink"
    return "think" if format_reward([], [text])[0] and reasoning_of(text) else None


def reasoning_of(text: str) -> str:
    """What stands between the think tags, or nothing."""
    _, opened, rest = text.partition("<think>")
    inside, closed, _ = rest.partition("</think>")
    return inside.strip() if opened and closed else ""


def why_unusable(text: str, options: dict[str, str], answer: str, form: str) -> tuple[str | None, str | None]:
    """(a key of REASONS or None, the letter that the text names or None), by the text alone."""
    if SPECIAL.search(text):
        return "special token", None
    read = read_tagged(text, options)
    if form_of(text) != form or not _is_unicode(text):
        return "form", read
    if read is None:
        return "unreadable", None
    return ("wrong", read) if read != answer else (None, read)


def judge_answers(
    options: dict[str, str], answer: str, replies: Sequence[Reply | None], form: str, per_question: int, kept: list[str]
) -> list[Verdict]:
    """A verdict on each reply (None: there is none) to a question whose right letter is `answer`, in their order.

    `kept`: the texts that the question has already; those that are kept now are added to it.
    """
    verdicts = []
    for reply in replies:
        text = reply.text.strip() if reply else None
        reason, read = why_unusable(text, options, answer, form) if text else ("no answer", None)
        if reply and text and reply.cut_off:
            reason = "cut off"
        if reason is None and any(" ".join(text.split()) == " ".join(other.split()) for other in kept if text):
            reason = "duplicate"
        if reason is None and len(kept) >= per_question:
            reason = "surplus"
        if reason is None and text:
            kept.append(text)
        verdicts.append(Verdict(text, reason, read))
    return verdicts


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
