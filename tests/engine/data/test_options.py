"""Options are found in the published texts, and answers are matched to them."""

import time

import pytest

from engine.data.options import list_options, match_option, parse_options


def test_med_r1_options():
    problem = (
        "What imaging technique is employed for obtaining this image? A)Mammogram, B)Positron emission tomography (PET), C)CT, "
        "D)Fluoroscopy"
    )
    expected = {"A": "Mammogram", "B": "Positron emission tomography (PET)", "C": "CT", "D": "Fluoroscopy"}
    assert parse_options(problem) == expected


def test_medvlm_r1_options():
    problem = "What is apparent in this image?\nA) Hemorrhage\nB) Acute infarct\nC) Abscess formation\nD) Chronic infarct"
    assert list(parse_options(problem).values()) == ["Hemorrhage", "Acute infarct", "Abscess formation", "Chronic infarct"]


@pytest.mark.parametrize(
    "problem, texts",
    [
        ("Which? A)x, y, and C, B)z", ["x, y, and C", "z"]),  # commas in a text
        ("Grade? A)Stage (I, B) or so, B)II", ["Stage (I, B) or so", "II"]),  # a marker inside parentheses
        ("Which? A)OCT (Optical Coherence, B)CT", ["OCT (Optical Coherence", "CT"]),  # never closed
        ("Which? A)B, B)A", ["B", "A"]),  # single letters
        ("Vitamin (A)? A)yes, B)no", ["yes", "no"]),  # letters in the question
        ("A) or B), which is it? A)left, B)right", ["left", "right"]),  # a list in the question
        ("Is it? A)yes B)no", ["yes", "no"]),  # no comma
        ("Is it?\nA) 1\n\nB) 2, 3\nC) 4 \n", ["1", "2, 3", "4"]),
        ("Pick. " + ", ".join(f"{letter})t{letter}" for letter in "ABCDEFGHIJ"), [f"t{letter}" for letter in "ABCDEFGHIJ"]),
        ("No options here", []),
        ("Only one? A)yes", []),
        ("Starts late? B)yes, C)no", []),
    ],
)
def test_odd_texts(problem, texts):
    assert parse_options(problem) == list_options(texts)


OPTIONS = {"A": "MRI", "B": "X-ray", "C": "Positron  emission tomography", "D": "Yes", "E": "yes"}


@pytest.mark.parametrize("answer", ["C", "c", "C)", "(C)", "(c)", "C.", " C \n", "C) PET", "c)positron emission\ntomography"])
def test_ways_to_name_an_option(answer):
    assert match_option(answer, OPTIONS) == "C"


def test_an_options_text_names_it():
    assert match_option("positron Emission\n tomography", OPTIONS) == "C"
    assert match_option("mri", OPTIONS) == "A"


@pytest.mark.parametrize(
    "answer", ["", "F", "K", "C, CT", "C: no", "Option C", "A C", "**C**", "С", "Ｃ", "C\u200b", "MRI scan", "ı"]
)
def test_anything_else_names_none(answer):
    assert match_option(answer, OPTIONS) is None


def test_contradictions_and_doubles_name_none():
    assert match_option("C) MRI", OPTIONS) is None  # another option's text
    assert match_option("yes", OPTIONS) is None  # two options' text
    assert match_option("E) yes", OPTIONS) == "E"


@pytest.mark.parametrize("unit", ["A)", " A)", ", B)", "(", " A) B)", "\n"])
def test_parsing_stays_quick_on_hostile_text(unit):
    start = time.perf_counter()
    parse_options(unit * (100_000 // len(unit)))
    assert time.perf_counter() - start < 5
