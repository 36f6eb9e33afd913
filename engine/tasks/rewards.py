"""Rewards of multiple-choice questions: is the answer right, and does the text keep to the format (Med-R1, MedVLM-R1).

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`, one number a completion; `columns` are
the data set's, repeated per completion. `accuracy` and `format` are 1 or 0 (MedVLM-R1's: also 0.5) and are summed.

The default reads the last well-formed `<answer>` and accepts every clear way to name an option (`match_option`); its format is
exactly one think block, then exactly one answer block. `compat="reference"` scores as Med-R1's code does, quirks included: the
first `<answer>` of a single line counts, must equal the solution's letter exactly, a completion without tags is compared whole,
and several blocks pass the format. (That code also asks math_verify first, which finds nothing in a letter.) MedVLM-R1's code
takes the first `<answer>` over several lines, in any case, and counts the letters A to J in it, those of words included: one that
is right gives 1, or 0.5 with anything beside it.

All parsing is linear in the length of the model's text, whatever the text.
"""

import re
from collections.abc import Callable

from engine.data.options import match_option

_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)
_MEDVLM_OPEN, _MEDVLM_CLOSE = re.compile("<answer>", re.IGNORECASE), re.compile("</answer>", re.IGNORECASE)
_THINK_THEN_ANSWER = re.compile(r"</think>\s*<answer>")
_EVALUATION_ANSWER = r"<answer>\s*(\w+)\s*</answer>"
_MEDR1_EVALUATION = re.compile(_EVALUATION_ANSWER)
_ADVMED_EVALUATION = re.compile(_EVALUATION_ANSWER, re.IGNORECASE)
_MEDVLM_EVALUATION = re.compile(r"<answer>\s*([A-Z])\s*</answer>")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def parse_answer(text: str, options: dict[str, str]) -> str | None:
    """The letter that the last well-formed `<answer>...</answer>` names (see `match_option`), or None.

    Tags match in any case and may span lines; of nested or unclosed tags the innermost pair counts.
    """
    content, start = None, None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            content, start = text[start : tag.start()], None
    return None if content is None else match_option(content, options)


def accuracy_reward(prompts, completions, answer, options, **columns) -> list[float]:
    """1 where `parse_answer` gives the row's `answer` letter."""
    return [float(parse_answer(text, choices) == gold) for text, gold, choices in zip(completions, answer, options, strict=True)]


def format_reward(prompts, completions, **columns) -> list[float]:
    """1 for exactly one think block, then exactly one answer block, and nothing but white space around them."""
    return [float(_is_think_answer(text.strip()) and _tag_counts(text) == (1, 1, 1, 1)) for text in completions]


def format_reward_nothink(prompts, completions, **columns) -> list[float]:
    """1 for exactly one answer block, no think tag, and nothing but white space around it."""
    return [float(_is_answer(text.strip()) and _tag_counts(text) == (0, 0, 1, 1)) for text in completions]


def _tag_counts(text: str) -> tuple[int, ...]:
    return tuple(text.count(tag) for tag in _TAGS)


def _is_think_answer(text: str) -> bool:
    """`<think>.*?</think>\\s*<answer>.*?</answer>` over the whole text, dots matching line breaks; several blocks pass."""
    inner_end = len(text) - len("</answer>")
    outer = text.startswith("<think>") and text.endswith("</answer>")
    return outer and _THINK_THEN_ANSWER.search(text, len("<think>"), inner_end) is not None


def _is_answer(text: str) -> bool:
    """`<answer>.*?</answer>` over the whole text, dots matching line breaks; several blocks pass."""
    return text.startswith("<answer>") and text.endswith("</answer>") and len(text) >= len("<answer></answer>")


def _medr1_answer(text: str) -> str:
    """`re.search(r"<answer>(.*?)</answer>")` without DOTALL, stripped; the whole stripped text where it finds nothing."""
    for line in text.split("\n"):  # the dot stops at line breaks; within a line the first tag decides, so no rescanning
        _, tag, rest = line.partition("<answer>")
        content, end, _ = rest.partition("</answer>")
        if tag and end:
            return content.strip()
    return text.strip()


def medr1_accuracy_reward(prompts, completions, solution, **columns) -> list[float]:
    """1 where Med-R1's code gives 1: extraction from completion and solution, then equality."""
    return [float(_medr1_answer(text) == _medr1_answer(gold)) for text, gold in zip(completions, solution, strict=True)]


def medr1_format_reward(prompts, completions, **columns) -> list[float]:
    """1 where Med-R1's think pattern matches the whole completion."""
    return [float(_is_think_answer(text)) for text in completions]


def medr1_format_reward_nothink(prompts, completions, **columns) -> list[float]:
    """1 where Med-R1's no-think pattern matches the whole completion: white space may lead, nothing may follow."""
    return [float(_is_answer(text.lstrip())) for text in completions]


def _medvlm_answer(text: str) -> str | None:
    """`re.search(r"<answer>(.*?)</answer>")` with DOTALL and IGNORECASE, stripped; None where it finds nothing."""
    start = _MEDVLM_OPEN.search(text)
    end = start and _MEDVLM_CLOSE.search(text, start.end())  # if none follows the first tag, none follows a later one
    return text[start.end() : end.start()].strip() if end else None


def _medvlm_accuracy(text: str, gold: str) -> float:
    """1 for the right letter alone, 0.5 where it is the only one of A to J among other signs, else 0."""
    answer = _medvlm_answer(text) or ""
    if re.findall("[A-J]", answer.upper()) != [gold]:
        return 0.0
    return 0.5 if re.sub(gold, "", answer, count=1, flags=re.IGNORECASE).strip() else 1.0


def medvlm_accuracy_reward(prompts, completions, solution, **columns) -> list[float]:
    """What MedVLM-R1's code gives: 1, 0.5 or 0, by the single letters of completion and solution."""
    letters = ["".join((_medvlm_answer(gold) or gold).upper().split()) for gold in solution]
    return [_medvlm_accuracy(text, letter) for text, letter in zip(completions, letters, strict=True)]


def extract_reference(text: str, ignore_case: bool = False) -> str | None:
    """What Med-R1's test scripts read from an answer: the word in the first `<answer> word </answer>`, or None.

    `ignore_case` is AdvMed-R1's variant. The answer is correct where `is_correct_reference` says so.
    """
    match = (_ADVMED_EVALUATION if ignore_case else _MEDR1_EVALUATION).search(text)
    return match[1] if match else None


def extract_medvlm(text: str) -> str | None:
    """What MedVLM-R1's test script reads from an answer: the capital in the first `<answer> C </answer>` with one, or None."""
    match = _MEDVLM_EVALUATION.search(text)
    return match[1] if match else None


def is_correct_reference(text: str, answer: str, ignore_case: bool = False) -> bool:
    """Whether Med-R1's (or, ignoring case, AdvMed-R1's) test script counts `text` as the letter `answer`."""
    word = extract_reference(text, ignore_case)
    return word is not None and (word.upper() == answer.upper() if ignore_case else word == answer)


_REWARDS = {
    ("think", "default"): (accuracy_reward, format_reward),
    ("nothink", "default"): (accuracy_reward, format_reward_nothink),
    ("think", "reference"): (medr1_accuracy_reward, medr1_format_reward),
    ("nothink", "reference"): (medr1_accuracy_reward, medr1_format_reward_nothink),
    ("complex", "default"): (accuracy_reward, format_reward),
    ("complex", "reference"): (medvlm_accuracy_reward, medr1_format_reward),  # one pattern in both papers' code
}


def vqa_rewards(template: str = "think", compat: str = "default") -> list[Callable]:
    """The two rewards of a run, named `accuracy` and `format`.

    `template` is think or nothink (Med-R1) or complex (MedVLM-R1), `compat` default or reference.
    """
    if (template, compat) not in _REWARDS:
        expected = "think/nothink/complex, default/reference"
        raise ValueError(f"no rewards for template {template!r} and compat {compat!r} (expected {expected})")
    return [_named(reward, name) for reward, name in zip(_REWARDS[template, compat], ("accuracy", "format"), strict=True)]


def _named(reward: Callable, name: str) -> Callable:
    """The same function under the name that its metrics carry."""

    def named(prompts, completions, **columns):
        return reward(prompts, completions, **columns)

    named.__name__, named.__doc__ = name, reward.__doc__
    return named
