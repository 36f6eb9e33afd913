"""How the papers' code scores multiple-choice answers, quirks included: Med-R1, MedVLM-R1 and AdvMed-R1.

Rewards of Med-R1: the first `<answer>` of a single line counts and must equal the solution's letter exactly; a completion without
tags is compared whole; several blocks pass the format. (That code also asks math_verify first, which finds nothing in a letter.)
Rewards of MedVLM-R1: the first `<answer>` over several lines, in any case; the letters A to J in it are counted, those of words
included: one that is right gives 1, or 0.5 with anything beside it.

Test scripts of Med-R1: think takes the word in the first `<answer>`; no-think that one where the text mentions "answer", else the
text itself; zero-shot takes the text itself. Of MedVLM-R1: complex takes the first `<answer>` around one capital letter; simple the
text itself. What is taken must equal the letter exactly. AdvMed-R1 reads as Med-R1's think, in any case.

All parsing is linear in the length of the model's text, whatever the text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.tasks.multiple_choice import (
    ClearAnswers,
    Scoring,
    asks_for_a_bare_letter,
    format_reward_of,
    is_answer,
    is_think_answer,
    named,
)
from engine.tasks.task import Reward

_MEDVLM_OPEN, _MEDVLM_CLOSE = re.compile("<answer>", re.IGNORECASE), re.compile("</answer>", re.IGNORECASE)
_EVALUATION_ANSWER = r"<answer>\s*(\w+)\s*</answer>"
_MEDR1_EVALUATION = re.compile(_EVALUATION_ANSWER)
_ADVMED_EVALUATION = re.compile(_EVALUATION_ANSWER, re.IGNORECASE)
_MEDVLM_EVALUATION = re.compile(r"<answer>\s*([A-Z])\s*</answer>")


def scoring(template: str, compat: str) -> Scoring:
    """What `--compat` means for a template: default, or reference, the code of the template's paper."""
    if compat not in ("default", "reference"):
        raise ValueError(f"compat is 'default' or 'reference', not {compat!r}")
    if compat == "default":
        return ClearAnswers()
    return MedVLMScoring() if template.startswith("medvlm") else MedR1Scoring()


@dataclass(frozen=True)
class MedR1Scoring:
    """Med-R1's rewards and test scripts."""

    name: str = "reference"

    def read(self, text: str, options: dict[str, str], template: str) -> str | None:
        if asks_for_a_bare_letter(template) or template.endswith("nothink") and "answer" not in text:
            return text
        return extract_medr1(text)

    def rewards(self, template: str) -> Sequence[Reward]:
        form = format_reward_of(template, medr1_format_reward, medr1_format_reward_nothink)
        return [named("accuracy", medr1_accuracy_reward), named("format", form)]


@dataclass(frozen=True)
class MedVLMScoring:
    """MedVLM-R1's rewards and test script; its format is Med-R1's."""

    name: str = "reference"

    def read(self, text: str, options: dict[str, str], template: str) -> str | None:
        return text if asks_for_a_bare_letter(template) else extract_medvlm(text)

    def rewards(self, template: str) -> Sequence[Reward]:
        return [named("accuracy", medvlm_accuracy_reward), named("format", medr1_format_reward)]


@dataclass(frozen=True)
class AdvMedScoring:
    """AdvMed-R1's test scripts, which train nothing."""

    name: str = "advmed"

    def read(self, text: str, options: dict[str, str], template: str) -> str | None:
        word = extract_medr1(text, ignore_case=True)
        return word and word.upper()

    def rewards(self, template: str) -> Sequence[Reward]:
        return []


def _medr1_answer(text: str) -> str:
    """`re.search(r"<answer>(.*?)</answer>")` without DOTALL, stripped; the whole stripped text where it finds nothing."""
    for line in text.split("\n"):  # the dot stops at line breaks; within a line the first tag decides, so no rescanning
        _, tag, rest = line.partition("<answer>")
        content, end, _ = rest.partition("</answer>")
        if tag and end:
            return content.strip()
    return text.strip()


def medr1_accuracy_reward(prompts: Any, completions: list[str], solution: list[str], **columns: Any) -> list[float]:
    """1 where Med-R1's code gives 1: extraction from completion and solution, then equality."""
    return [float(_medr1_answer(text) == _medr1_answer(gold)) for text, gold in zip(completions, solution, strict=True)]


def medr1_format_reward(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """1 where Med-R1's think pattern matches the whole completion."""
    return [float(is_think_answer(text)) for text in completions]


def medr1_format_reward_nothink(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """1 where Med-R1's no-think pattern matches the whole completion: white space may lead, nothing may follow."""
    return [float(is_answer(text.lstrip())) for text in completions]


def _medvlm_answer(text: str) -> str | None:
    """`re.search(r"<answer>(.*?)</answer>")` with DOTALL and IGNORECASE, stripped; None where it finds nothing."""
    start = _MEDVLM_OPEN.search(text)
    if start is None:
        return None
    end = _MEDVLM_CLOSE.search(text, start.end())  # if none follows the first tag, none follows a later one
    return text[start.end() : end.start()].strip() if end else None


def _medvlm_accuracy(text: str, gold: str) -> float:
    """1 for the right letter alone, 0.5 where it is the only one of A to J among other signs, else 0."""
    answer = _medvlm_answer(text) or ""
    if re.findall("[A-J]", answer.upper()) != [gold]:
        return 0.0
    return 0.5 if re.sub(gold, "", answer, count=1, flags=re.IGNORECASE).strip() else 1.0


def medvlm_accuracy_reward(prompts: Any, completions: list[str], solution: list[str], **columns: Any) -> list[float]:
    """What MedVLM-R1's code gives: 1, 0.5 or 0, by the single letters of completion and solution."""
    letters = ["".join((_medvlm_answer(gold) or gold).upper().split()) for gold in solution]
    return [_medvlm_accuracy(text, letter) for text, letter in zip(completions, letters, strict=True)]


def extract_medr1(text: str, ignore_case: bool = False) -> str | None:
    """What Med-R1's test scripts read from an answer: the word in the first `<answer> word </answer>`, or None.

    `ignore_case` is AdvMed-R1's variant.
    """
    match = (_ADVMED_EVALUATION if ignore_case else _MEDR1_EVALUATION).search(text)
    return match[1] if match else None


def extract_medvlm(text: str) -> str | None:
    """What MedVLM-R1's test script reads from an answer: the capital in the first `<answer> C </answer>` with one, or None."""
    match = _MEDVLM_EVALUATION.search(text)
    return match[1] if match else None
