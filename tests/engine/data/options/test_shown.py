"""Options are found in the published texts and in others."""

import time

import pytest
from hypothesis import given

from engine.data.options.shown import list_options, parse_options, same_options
from engine.data.options.texts import LETTERS
from tests.fuzz import bounded, joined


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
        ("Pick. " + ", ".join(f"{letter})t{letter}" for letter in LETTERS), [f"t{letter}" for letter in LETTERS]),
        ("Which? A) hepatitis A), B) hepatitis B), C) hepatitis C)", ["hepatitis A)", "hepatitis B)", "hepatitis C)"]),
        ("Q?\nA) CT\nB) MRI\n\nAnswer with the letter.", ["CT", "MRI"]),  # an instruction after the list
        ("Q?\nA) CT\nB) MRI\nAnswer with the letter.", ["CT", "MRI"]),
        ("Q? A)CT, B)MRI. Please choose A) or B)", ["CT", "MRI"]),
        ("Q? A)CT, B)MRI. Choose either A) or B) only.", ["CT", "MRI"]),
        ("Q? A)CT., B)MRI. Answer with one letter.", ["CT.", "MRI."]),
        ("Q? A)CT, B)MRI (choose one)", ["CT", "MRI"]),
        ("Q? A)CT, B)MRI\nYour task: think.", ["CT", "MRI"]),
        ("Q? A)No answer, B)Select none", ["No answer", "Select none"]),  # words of an instruction, and none
        ("Q? A) one\nand more\nB) two\nand more", ["one\nand more", "two\nand more"]),
        ("Q? (A) CT (B) MRI (3 T)", ["CT", "MRI (3 T)"]),
        ("Q?\n(A) CT\n(B) MRI", ["CT", "MRI"]),
        ("Q?\nA. CT\nB. MRI", ["CT", "MRI"]),
        ("Q?\n A: CT\n B: MRI", ["CT", "MRI"]),
        ("Vitamin A. or B. deficiency", []),
        ("No options here", []),
        ("Only one? A)yes", []),
        ("Starts late? B)yes, C)no", []),
    ],
)
def test_odd_texts(problem, texts):
    assert parse_options(problem) == list_options(texts)


def test_letters_that_a_list_has_are_not_part_of_its_texts():
    for listed in (["A: MRI", "B: CT"], ["(A) MRI", "(B) CT"], ["a. MRI", "b. CT"]):
        assert list_options(listed) == {"A": "MRI", "B": "CT"}
    assert list_options(["A: MRI", "CT"]) == {"A": "A: MRI", "B": "CT"}
    assert list_options(["B: MRI", "A: CT"]) == {"A": "B: MRI", "B": "A: CT"}  # as they stand: the letters shown are ours


def test_what_a_list_and_a_text_have_in_common():
    assert same_options({"A": "CT ", "B": "**MRI**"}, {"A": "ct", "B": "MRI."})
    assert not same_options({"A": "CT", "B": "MRI"}, {"A": "MRI", "B": "CT"})
    assert not same_options({"A": "CT", "B": "MRI"}, {"A": "CT", "B": "MRI", "C": "PET"})


def test_only_a_list_whose_options_stand_apart_is_one_beyond_doubt():
    assert parse_options("Is it? A)yes, B)no", apart=True) == {"A": "yes", "B": "no"}
    for text in ("What do (A) and (B) show?", "Is A) left of B) here?", "Q? A) , B) no"):
        assert parse_options(text, apart=True) == {}


WORDS = ["A ", "the left ", "B ", "(see A, B) ", "x, y ", "type-A ", "MRI. ", "(PET) ", "C; ", "é ", "|", "|"]


@bounded()
@given(joined(WORDS, most=9))
def test_fuzz_a_list_that_is_shown_is_read_back(text):
    listed = [part.strip().rstrip(",;") or "none" for part in f"CT|{text}".split("|")]
    options = dict(zip(LETTERS, listed, strict=False))
    for separator in ("\n", ", "):
        shown = "What is it? " + separator.join(f"{letter}) {text}" for letter, text in options.items())
        assert parse_options(shown) == options


@bounded()
@given(joined(["A", "B", "C", ")", "(", " ", ", ", "; ", ".", ":", "\n", "A)", "B)", "(A)", "answer ", "please ", "x"], most=25))
def test_fuzz_any_text_has_options_from_a_on_or_none(text):
    for apart in (False, True):
        options = parse_options(text, apart=apart)
        assert list(options) == list(LETTERS[: len(options)]) and len(options) != 1
        assert all(option in text for option in options.values())


@pytest.mark.parametrize("unit", ["A)", " A)", ", B)", "(", " A) B)", "\n", " ", "A) B) (", ". please", " (A) (B)", "\nA. B."])
def test_parsing_stays_quick_on_hostile_text(unit):
    start = time.process_time()
    parse_options(unit * (100_000 // len(unit)))
    assert time.process_time() - start < 5
