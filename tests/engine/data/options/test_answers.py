"""Every clear way to name an option is read, whoever wrote it; what is unclear or contradicts itself names none."""

import time

import pytest
from hypothesis import given

from engine.data.options.answers import LONGEST, read_option, read_tagged
from engine.data.options.texts import LETTERS, clean, plain
from tests.fuzz import bounded, joined

OPTIONS = {"A": "MRI", "B": "CT", "C": "Positron  emission tomography (PET)", "D": "No", "E": "A plain film"}

MARKUP = [
    *r"C¦c¦C.¦C)¦(C)¦( C )¦[C]¦{C}¦<C>¦C:¦C!¦ C ¦'C'¦“C”¦`C`¦**C**¦*C*¦__C__¦_C_¦\boxed{C}¦$\boxed{C}$¦\text{C}".split("¦"),
    *r"\boxed{\text{C}}¦\(C\)¦$C$¦<b>C</b>¦- C¦• C¦> C¦Ｃ¦（Ｃ）¦C。¦Ⓒ¦⒞".split("¦"),
    *("C\u200b", "\u2060C", '"C"', "\nC\n"),
]
LEADS = [
    *"Answer: C¦answer C¦Answer - C¦Ans: C¦ANSWER = C¦The answer is C¦the answer is: **C**.¦The correct answer is (C)".split("¦"),
    *"Final answer: C¦My final answer is C¦So the answer is C¦Therefore, the correct option is C¦Option C¦option (C)".split("¦"),
    *"Choice C¦Letter C¦Correct option: C¦Answer: Option C¦The most likely answer is C¦I choose C¦It is C¦It's C".split("¦"),
    *"Based on the image, the answer is C.¦It is grey. Answer: C¦I think the correct option is: (C)¦{'answer': 'C'}".split("¦"),
    *"I would go with option C¦C is correct¦Option C is the correct answer¦C is the answer".split("¦"),
]
TEXT = "positron emission\tTomography (PET)"
WITH_TEXT = [
    answer.replace("TEXT", TEXT)
    for answer in [
        *"TEXT¦TEXT.¦the TEXT¦It is TEXT¦The answer is TEXT¦TEXT (C)¦TEXT, (C)¦C) TEXT¦C. TEXT¦C: TEXT¦(C) TEXT¦(C): TEXT".split(
            "¦"
        ),
        *"C - TEXT¦C – TEXT¦C, TEXT¦C = TEXT¦C TEXT¦C (TEXT)¦c) TEXT¦C)TEXT¦**C.** TEXT¦**C) TEXT**¦Option C: TEXT".split("¦"),
        *r"The correct answer is C. TEXT.¦\boxed{C. TEXT}¦Ｃ．TEXT¦C、TEXT¦C ) TEXT¦C: TEXT, as the colours show".split("¦"),
        *("C\nTEXT", "C) PET", "C. a PET scan"),
    ]
]
UNCLEAR = [
    *"¦ ¦.¦**¦?¦C?¦F¦K¦3¦С¦ı¦CC¦A C¦AC¦-C¦C+¦~C¦()¦Answer:¦The answer is¦Option¦<answer>".split("¦"),
    *"A or C¦A and C¦A, C¦A/C¦A & C¦C | D¦C or D¦C) or D)¦C; D¦C. D¦C vs D¦Between B and C¦A) MRI, B) CT¦either A or C".split("¦"),
    *"ABCD¦all of the above¦none¦CT or MRI¦MRI, not CT¦MRI (B)¦CT (C)¦C) CT¦C. MRI¦(C) No¦C: CT".split("¦"),
    *"Not A, so the answer is C¦A) is likely. Answer: C¦Is it CT? The answer is C¦The answer is A or the answer is C".split("¦"),
    *"not C¦The answer is not C¦C: not seen¦C) is wrong¦C is incorrect¦C) maybe¦C. Not PET but CT¦C. I think B) too".split("¦"),
    *"C) The answer is B.¦maybe C¦C maybe¦C, a PET scan¦C-arm¦CT scan¦MRI scan¦PET¦I think so".split("¦"),
]


@pytest.mark.parametrize("answer", MARKUP + LEADS + WITH_TEXT)
def test_clear_answers(answer):
    assert read_option(answer, OPTIONS) == "C"
    assert read_tagged(f"<think>A or B?</think>\n<answer>{answer}</answer>", OPTIONS) == "C"


@pytest.mark.parametrize("answer", UNCLEAR)
def test_unclear_and_contradicting_answers(answer):
    assert read_option(answer, OPTIONS) is None


def test_a_letter_is_a_letter_and_a_text_a_text():
    groups = {"A": "O", "B": "A", "C": "AB", "D": "A+"}
    assert [read_option(answer, groups) for answer in ("A", "B", "AB", "B) A", "A) O", "O", "A+", "a+")] == list("ABCBAADD")
    assert read_option("A) A", groups) is None  # the letter of one, the text of another
    assert read_option("no", OPTIONS) == read_option("D. No.", OPTIONS) == "D"
    assert read_option("a plain film", OPTIONS) == read_option("plain film", OPTIONS) == read_option("A plain film", OPTIONS) == "E"


def test_an_option_within_another_is_not_its_contradiction():
    options = {"A": "CT", "B": "CT angiography", "C": "no finding"}
    assert read_option("B) CT angiography", options) == read_option("B. CT angiography, late phase", options) == "B"
    assert read_option("A) CT angiography", options) is None
    assert read_option("A. CT, late phase", options) == "A"
    assert read_option("C. No finding at all", options) == "C"


def test_a_text_that_two_options_share_needs_its_letter():
    options = {"A": "Yes", "B": "yes.", "C": "no"}
    assert read_option("yes", options) is None
    assert read_option("B) yes", options) == "B"


def test_options_beyond_the_tenth():
    options = {letter: f"sign {number}" for number, letter in enumerate(LETTERS)}
    assert [read_option(answer, options) for answer in ("K", "(z)", "L. sign 11", "I", "I) sign 8", "I think so")] == [
        *"KZLII",
        None,
    ]


def test_what_is_compared():
    assert clean(" - **The** <b>left</b>\nlung. ") == "The left lung" and plain("ＣＴ") == "ct"
    assert clean(r"\boxed{\text{(a)}}") == "a" and clean("(a) or (b)") == "(a) or (b)" and clean("-5") == "-5"


HOSTILE = r"Answer: C. ¦C. ¦(¦\a{¦the answer is ¦ ¦C) ¦**¦not ¦<b>¦- ¦is correct ¦ is the¦" + "\ufdfa"


@pytest.mark.parametrize("unit", HOSTILE.split("¦"))
def test_reading_stays_quick_on_hostile_text(unit):
    start = time.process_time()
    for length in (LONGEST, 100_000):
        read_option(unit * (length // len(unit)), OPTIONS)
        read_option("C) " + unit * (length // len(unit)), OPTIONS)
        read_tagged("<answer>" * (length // 8) + unit + "</answer>", OPTIONS)
    assert time.process_time() - start < 1


PIECES = r"A¦B¦c¦D¦(¦)¦.¦:¦ ¦**¦ or ¦ and ¦not ¦answer¦ is ¦the ¦option ¦MRI¦CT¦No¦Ａ¦\boxed{¦}¦, ¦¦é¦\n¦?".split("¦")


@bounded()
@given(joined(PIECES, most=9))
def test_fuzz_what_is_read_is_an_option_and_no_other(text):
    letter = read_option(text, OPTIONS)
    assert letter is None or letter in OPTIONS
    if letter is not None:
        assert read_option(f"**{text}**", OPTIONS) == read_option(f" {text}\n", OPTIONS) == letter
        other = next(other for other in OPTIONS if other != letter)
        assert read_option(f"{text} or {other}", OPTIONS) is read_option(f"{other} or {text}", OPTIONS) is None
