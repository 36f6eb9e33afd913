"""Rewards: the published scores where asked for, sound ones by default, and quick on any text."""

import json
import time

import pytest

from engine.data.options.answers import read_tagged
from engine.tasks.multiple_choice import ClearAnswers
from engine.tasks.published import AdvMedScoring, MedR1Scoring, extract_medr1, extract_medvlm, scoring

OPTIONS = {"A": "MRI", "B": "X-ray", "C": "CT", "D": "Ultrasound"}
THINK = "<think>axial slices</think>"
TEMPLATES = {"think": "medr1_train_think", "nothink": "medr1_train_nothink", "complex": "medvlm_train_complex"}


def score(text: str, template: str = "think", compat: str = "default", solution: str = "<answer> C </answer>") -> dict[str, float]:
    columns = {"solution": [solution], "answer": ["C"], "options": [OPTIONS], "problem": ["?"]}
    rewards = scoring(TEMPLATES[template], compat).rewards(TEMPLATES[template])
    return {reward.__name__: reward(["?"], [text], **columns)[0] for reward in rewards}


def golden_strings(golden) -> list[tuple[str, dict]]:
    cases = json.loads((golden / "grpo" / "reward_golden.json").read_text())["vqa"]
    texts = []
    for case in cases:
        text = case["completion"]
        if isinstance(text, dict):
            prefix, unit, count, suffix = text["repeat"]
            text = prefix + unit * count + suffix
        texts.append((text, case))
    return texts


def test_reference_rewards_are_the_published_ones_on_every_golden_string(golden):
    cases = golden_strings(golden)
    assert len(cases) == 81
    for text, case in cases:
        think, nothink = score(text, "think", "reference"), score(text, "nothink", "reference")
        assert think == {"accuracy": case["medr1_accuracy"], "format": case["medr1_format_think"]}, text
        assert nothink == {"accuracy": case["medr1_accuracy_nothink_script"], "format": case["medr1_format_nothink"]}, text


def test_medvlm_reference_rewards_are_the_published_ones_on_every_golden_string(golden):
    cases = golden_strings(golden)
    assert len(cases) == 81 and {case["medvlm_accuracy"] for _, case in cases} == {0, 0.5, 1}
    for text, case in cases:
        for solution in ("C", " c\n", "<answer> C </answer>", "<ANSWER>\nC</answer>"):
            expected = {"accuracy": case["medvlm_accuracy"], "format": case["medvlm_format"]}
            assert score(text, "complex", "reference", solution) == expected, text
        assert score(text, "complex") == score(text), text
        assert extract_medvlm(text) == case["eval_medvlm_complex_extract"], text
        assert (extract_medvlm(text) == "C") == case["eval_medvlm_complex_correct"], text


def test_reference_evaluation_is_the_published_one_on_every_golden_string(golden):
    for text, case in golden_strings(golden):
        assert extract_medr1(text) == case["eval_medr1_extract"], text
        assert (MedR1Scoring().read(text, OPTIONS, "medr1_eval_think") == "C") == case["eval_medr1_correct"], text
        assert extract_medr1(text, ignore_case=True) == case["eval_advmed_extract"], text
        assert (AdvMedScoring().read(text, OPTIONS, "medr1_eval_think") == "C") == case["eval_advmed_correct"], text


@pytest.mark.parametrize(
    "content", ["C", " c ", "C)", "(C)", "C.", "C) CT", "C)CT", "ct", "\nC\n", "C, CT", "Option C", "**C**", "\\boxed{C}"]
)
def test_every_clear_answer_counts(content):
    assert score(f"{THINK}<answer>{content}</answer>") == {"accuracy": 1, "format": 1}


@pytest.mark.parametrize("content", ["", "A", "A or C", "C) MRI", "CC", "A C", "K", "3", "С", "not C", "C?"])
def test_wrong_and_unclear_answers_do_not(content):
    assert score(f"{THINK}<answer>{content}</answer>") == {"accuracy": 0, "format": 1}


@pytest.mark.parametrize(
    "text, letter",
    [
        ("<answer>A</answer><answer>C</answer>", "C"),  # the last
        ("<answer>C</answer><answer>B", "C"),  # well-formed
        ("<answer>C</answer> so </answer>", "C"),
        ("<answer>A<answer>C</answer>", "C"),  # the innermost
        ("<think>maybe <answer>A</answer></think><ANSWER>C</Answer>", "C"),
        ("<think>I say <answer>C</answer></think><answer>A</answer>", "A"),
        ("C", None),  # no tags
        ("<answer>C", None),
        ("</answer>C<answer>", None),
        ("<answer >C</answer>", None),
        ("<an\u017fwer>C</an\u017fwer>", None),  # a long s equals an s where case is ignored carelessly
    ],
)
def test_the_last_well_formed_answer_counts(text, letter):
    assert read_tagged(text, OPTIONS) == letter


def test_a_letter_that_is_no_option_is_no_answer():
    assert read_tagged("<answer>C</answer>", {"A": "yes", "B": "no"}) is None


@pytest.mark.parametrize(
    "text, think, nothink",
    [
        (f"{THINK}<answer>C</answer>", 1, 0),
        (f"\n{THINK} \n<answer>C</answer>\n", 1, 0),
        ("<answer>C</answer>", 0, 1),
        (" <answer>C</answer> ", 0, 1),
        (f"{THINK}<answer>C</answer>.", 0, 0),
        (f"well {THINK}<answer>C</answer>", 0, 0),
        (f"{THINK} so <answer>C</answer>", 0, 0),
        (f"{THINK}{THINK}<answer>C</answer>", 0, 0),
        (f"{THINK}<answer>A</answer><answer>C</answer>", 0, 0),
        ("<think><answer>A</answer></think><answer>C</answer>", 0, 0),
        (f"<answer>C</answer>{THINK}", 0, 0),
        ("<think><answer>C</answer>", 0, 0),
        ("<think></answer>", 0, 0),
        ("<answer>C</answer><answer>C</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_format_is_exactly_one_block_of_each(text, think, nothink):
    assert (score(text)["format"], score(text, "nothink")["format"]) == (think, nothink)


def test_rewards_go_through_a_batch_in_order():
    accuracy, form = ClearAnswers().rewards("medr1_train_think")
    completions = ["<answer>A</answer>", f"{THINK}<answer>B</answer>"]
    assert accuracy(["?"] * 2, completions, answer=["A", "C"], options=[OPTIONS] * 2) == [1, 0]
    assert form(["?"] * 2, completions) == [0, 1]


def test_an_unknown_way_to_score_is_an_error():
    with pytest.raises(ValueError, match="compat is 'default' or 'reference', not 'published'"):
        scoring("medr1_train_think", "published")


HOSTILE = ["<think>", "</think>", "<answer>", "</answer>", "<answer>C", "<answer> ", "</think> ", "<answer>C ", " ", "\n", "(", "C"]


@pytest.mark.parametrize("unit", HOSTILE)
def test_scoring_stays_quick_on_hostile_text(unit):
    body = unit * (100_000 // len(unit))
    start = time.process_time()
    for text in (body, f"<think>{body}</answer>", f"<answer>{body}</answer>"):
        for template in ("think", "nothink", "complex"):
            score(text, template), score(text, template, "reference")
        extract_medr1(text), extract_medr1(text, ignore_case=True), extract_medvlm(text)
    assert time.process_time() - start < 10
