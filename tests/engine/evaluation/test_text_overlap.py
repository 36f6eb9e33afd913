"""Words in common, against counts made by hand, and BLEU and ROUGE, against their formulas."""

import math

import pytest

from engine.evaluation.text_overlap import bleu_scores, content_words, is_right, rouge_scores, word_overlap, words_of


def test_words_are_without_case_punctuation_and_articles():
    assert words_of("The T2-weighted scan, 3.5 cm!") == ["the", "t2", "weighted", "scan", "3.5", "cm"]
    assert content_words("The two lesions.") == ["2", "lesions"] and content_words("A") == ["a"] and content_words("") == []
    assert words_of("+") == ["+"] and words_of("左 肺") == ["左", "肺"]


@pytest.mark.parametrize(
    "answer, truth, precision, recall, f1, exact",
    [
        ("a bright lesion", "The bright lesion.", 1, 1, 1, True),
        ("bright lesion in the liver", "a dark lesion", 1 / 4, 1 / 2, 1 / 3, False),
        ("liver liver liver", "liver", 1 / 3, 1, 1 / 2, False),
        ("lesion bright", "bright lesion", 1, 1, 1, False),
        ("", "liver", 0, 0, 0, False),
        ("spleen", "liver", 0, 0, 0, False),
    ],
)
def test_overlap_counts_each_word_as_often_as_in_both(answer, truth, precision, recall, f1, exact):
    found = word_overlap(answer, truth)
    assert (found.precision, found.recall, found.f1, found.exact) == pytest.approx((precision, recall, f1, exact))


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        ("Yes.", "yes", True),
        ("Yes, there is no doubt.", "Yes", True),
        ("No, it is not; yes would be wrong", "yes", False),
        ("There is a lesion.", "yes", False),
        ("MRI", "mri.", True),
        ("It is an MRI", "MRI", False),
        ("", "no", False),
    ],
)
def test_a_closed_answer_is_exact_but_for_yes_and_no(answer, truth, right):
    assert is_right(answer, truth) is right


def test_bleu_is_that_of_its_formula():
    truth = "a dark lesion in the upper left part"
    assert bleu_scores([truth], [truth]) == {"bleu": 1.0, "bleu_1": 1.0, "bleu_2": 1.0, "bleu_3": 1.0}
    answer = "a dark lesion in the lower left"  # 7 words for 8: precisions 6/7, 4/6, 3/5, 2/4, brevity exp(1 - 8/7)
    brevity = math.exp(1 - 8 / 7)
    found = bleu_scores([answer], [truth])
    assert found["bleu"] == pytest.approx(brevity * (6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)
    assert [found[f"bleu_{n}"] for n in (1, 2, 3)] == pytest.approx([brevity * 6 / 7, brevity * 4 / 6, brevity * 3 / 5])
    assert bleu_scores([answer, truth], [truth, truth])["bleu_1"] == pytest.approx((brevity * 6 / 7 + 1) / 2)


def test_bleu_of_nothing_in_common_is_nothing_and_no_warning(recwarn):
    assert bleu_scores(["", "x"], ["liver", "y"]) == {"bleu": 0.0, "bleu_1": 0.0, "bleu_2": 0.0, "bleu_3": 0.0}
    assert bleu_scores([""], ["liver"])["bleu"] == 0 and not list(recwarn)


def test_bleu_of_right_answers_that_are_short_is_below_one():
    found = bleu_scores(["bright lesion"], ["bright lesion"])
    assert found["bleu_2"] == 1 and found["bleu_3"] == 0 and 0 < found["bleu"] < 1


def test_rouge_is_that_of_its_formula():
    found = rouge_scores("the lesion is bright", "a bright lesion")  # 2 words of 4 and of 3 in common; a common subsequence of 1
    assert found == pytest.approx({"rouge1": 4 / 7, "rouge2": 0, "rougeL": 2 / 7})
    assert rouge_scores("左 肺", "左 肺")["rougeL"] == 1 and rouge_scores("", "liver")["rouge1"] == 0
