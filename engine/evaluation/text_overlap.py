"""How far a text says what the true answer says: words in common, BLEU and ROUGE.

    precision, recall, F1     words in common, as often as in both, over the answer's, over the truth's, and their harmonic mean
    exact                     the same words in the same order
    BLEU      Papineni et al., ACL 2002, by NLTK: of a whole set (up to four words, equal weights, smoothing 1 of Chen and Cherry,
              2014), and BLEU-n with all weight on n words, a mean over answers without smoothing
    ROUGE     Lin, 2004, by rouge-score: F1 of one and two words and of the longest common subsequence (1, 2, L), means over answers

By NLTK's rule, which the published numbers follow, an answer of fewer than n words has no n words in common with any text, not even
with itself: BLEU of right answers that are short is below 1.

Words are lower case, without punctuation; the first four measures also drop a, an and the, and read "two" as 2, as VQA's do.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ROUGE = ("rouge1", "rouge2", "rougeL")
BLEU_SIZES = (1, 2, 3)


def words_of(text: str) -> list[str]:
    """Lower case, without punctuation; where a text has nothing else, as it stands."""
    return _WORD.findall(text.lower()) or text.lower().split()


def content_words(text: str) -> list[str]:
    """`words_of` without articles, unless there is nothing else (an option "A"), and with numbers in digits."""
    words = words_of(text)
    return [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES] or words


@dataclass(frozen=True)
class Overlap:
    """Fractions, but `exact`."""

    precision: float
    recall: float
    f1: float
    exact: bool


def word_overlap(answer: str, truth: str) -> Overlap:
    """Of an answer with the true one. An answer without words has nothing in common with a truth that has some."""
    said, true = content_words(answer), content_words(truth)
    common = (Counter(said) & Counter(true)).total()
    precision, recall = (common / len(words) if words else float(said == true) for words in (said, true))
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Overlap(precision, recall, f1, said == true)


def is_right(answer: str, truth: str) -> bool:
    """Whether a closed question is answered rightly: the same words, or to yes and no the one of them that comes first."""
    said, true = content_words(answer), content_words(truth)
    if true in (["yes"], ["no"]):
        return next((word for word in said if word in ("yes", "no")), None) == true[0]
    return said == true


def bleu_scores(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """bleu of the set, bleu_1 to bleu_3 (fractions); one true answer each, at least one."""
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, modified_precision, sentence_bleu  # one second

    said, true = [words_of(text) for text in answers], [[words_of(text)] for text in truths]
    found = {"bleu": float(corpus_bleu(true, said, smoothing_function=SmoothingFunction().method1)) if any(said) else 0.0}
    for size in BLEU_SIZES:
        weights = [float(n == size) for n in range(1, size + 1)]
        pairs = [(one, ref) for one, ref in zip(said, true, strict=True) if len(one) >= size and modified_precision(ref, one, size)]
        found[f"bleu_{size}"] = sum(float(sentence_bleu(ref, one, weights=weights)) for one, ref in pairs) / len(said)
    return found


def rouge_scores(answer: str, truth: str) -> dict[str, float]:
    """rouge1, rouge2 and rougeL of an answer, F1 as fractions."""
    scored = _scorer().score(truth, answer)
    return {name: float(scored[name].fmeasure) for name in ROUGE}


class _Words:
    """`words_of` for rouge-score, whose own tokenizer knows Latin letters only."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings NLTK: one second

    return RougeScorer(list(ROUGE), tokenizer=_Words())
