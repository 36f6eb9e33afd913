"""Accuracy of multiple-choice answers with its 95 % interval: overall, per modality, per question type (Med-R1, section 4).

    p = correct / n,  interval: Wilson's score interval, which stays inside [0, 1] and holds for small n and p near 0 or 1

An answer is read by `engine.tasks.rewards.parse_answer`; with the templates zeroshot and simple, which ask for a letter without
tags, a text that is itself an answer (`C`, `C) CT`, `CT`) counts too. `compat="reference"` reads as the published test scripts do,
each in its own way. Med-R1: think takes the word in the first `<answer>`; no-think that one where the text mentions "answer", else
the text itself; zero-shot takes the text itself. MedVLM-R1: complex takes the first `<answer>` around one capital letter; simple
the text itself. There the word must equal the letter exactly.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scipy.stats import binomtest
from tqdm.auto import tqdm

from engine.data.options import match_option
from engine.files import write_json, write_whole
from engine.processes import gather, my_share
from engine.report.charts import accuracy_figure, as_png
from engine.tasks.rewards import extract_medvlm, extract_reference, parse_answer
from engine.tasks.templates import build_prompt

GROUPINGS = ("modality", "question_type")


@dataclass(frozen=True)
class Score:
    """So many right of so many; accuracy and the ends of its interval are fractions."""

    num_correct: int
    num_samples: int

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (low, high)."""
        return tuple(float(end) for end in binomtest(self.num_correct, self.num_samples).proportion_ci(method="wilson"))

    def as_dict(self) -> dict:
        low, high = self.interval
        counts = {"num_correct": self.num_correct, "num_samples": self.num_samples}
        return {"accuracy": self.accuracy, "low": low, "high": high, **counts}


@dataclass(frozen=True)
class Evaluation:
    """One entry of `results` a question, in the questions' order; see `_result` for its keys."""

    results: list[dict]
    template: str
    compat: str

    @property
    def overall(self) -> Score:
        return _score(self.results)

    @property
    def unanswered(self) -> float:
        """Fraction of texts in which no answer was found."""
        return sum(result["extracted_answer"] is None for result in self.results) / len(self.results)

    def by(self, grouping: str) -> dict[str, Score]:
        """A score for each value of `modality` or `question_type`, in alphabetical order; questions without one are left out."""
        names = sorted({result[grouping] for result in self.results if result[grouping] is not None})
        return {name: _score([result for result in self.results if result[grouping] == name]) for name in names}

    def accuracies(self, grouping: str) -> dict[str, float]:
        """`by` without counts and intervals."""
        return {name: score.accuracy for name, score in self.by(grouping).items()}

    def headline(self) -> dict:
        """accuracy, low, high, num_samples and unanswered, as fractions and a count."""
        score = self.overall.as_dict()
        return {key: score[key] for key in ("accuracy", "low", "high", "num_samples")} | {"unanswered": self.unanswered}


def _score(results: list[dict]) -> Score:
    return Score(sum(result["correct"] for result in results), len(results))


def evaluate(
    answer_fn: Callable[..., list[str]],
    questions,
    *,
    template: str | Callable[[dict], list[dict]],
    batch_size: int,
    compat: str = "default",
    progress: bool = True,
) -> Evaluation:
    """Ask every question of a `QuestionSet` (at least one) and score the answers.

    `answer_fn(prompts, images, image_keys=keys)` answers a batch: chat messages, lists of PIL images, and what identifies each
    prompt's images. `template` is a name in `engine.tasks.templates.TEMPLATES` or a function from a row to its messages.
    """
    prompt_of = partial(build_prompt, template) if isinstance(template, str) else template

    def answer_rows(rows: list[dict]) -> list[str]:
        keys = [row["image_id"] for row in rows]
        return answer_fn([prompt_of(row) for row in rows], [row["images"] for row in rows], image_keys=keys)

    texts = ask(answer_rows, questions, batch_size=batch_size, progress=progress)
    return score_texts(questions, texts, _name_of(prompt_of), compat)


def ask(
    answer_rows: Callable[[list[dict]], list[str]],
    questions,
    *,
    batch_size: int,
    progress: bool = True,
    doing: str = "evaluating",
) -> list[str]:
    """The answer to each row of a `QuestionSet`, in its order; `doing` stands at the progress bar.

    Where processes were started together the questions are divided among them, and every process returns the whole.
    """
    # Questions about one image lie together, and beside those of its folder, whose images are mostly of one size.
    mine = my_share(sorted(range(len(questions)), key=lambda i: questions.record(i)["image_id"]))
    texts = {}
    with tqdm(total=len(mine), desc=doing, unit="question", disable=not progress, leave=False) as bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            texts |= zip(batch, answer_rows([questions[i] for i in batch]), strict=True)
            bar.update(len(batch))
    texts = gather(texts)
    return [texts[i] for i in range(len(questions))]


def score_texts(questions, texts: list[str], template: str, compat: str = "default") -> Evaluation:
    """The evaluation of a text for each row, in the rows' order."""
    results = [_result(questions.record(i), text, template, compat) for i, text in enumerate(texts)]
    return Evaluation(results, template, compat)


def _name_of(prompt_of: Callable) -> str:
    """The published template's name, or that of the function."""
    if isinstance(prompt_of, partial) and prompt_of.func is build_prompt:
        return prompt_of.args[0]
    return getattr(prompt_of, "__name__", "own")


def _result(record: dict, text: str, template: str, compat: str) -> dict:
    """Med-R1's four keys of a result (`question` with the keys of its files), then ours."""
    extracted = read_answer(text, record["options"], template, compat)
    return {
        "question": {"image": record["image_id"], "problem": record["problem"], "solution": record["solution"]},
        "ground_truth": record["solution"],
        "model_output": text,
        "extracted_answer": extracted,
        "correct": extracted == record["answer"],
        **{key: record[key] for key in ("source", "row", *GROUPINGS)},
    }


def read_answer(text: str, options: dict[str, str], template: str, compat: str = "default") -> str | None:
    """What `text` answers: a letter of `options`, or with `compat="reference"` what the published script for the template reads,
    with "advmed" what AdvMed-R1's scripts read."""
    if compat == "advmed":
        word = extract_reference(text, ignore_case=True)
        return word and word.upper()
    bare = template.endswith(("zeroshot", "simple"))
    if compat == "default":
        tagged = parse_answer(text, options)
        return match_option(text, options) if bare and tagged is None else tagged
    if bare or template.endswith("nothink") and "answer" not in text:
        return text
    return extract_medvlm(text) if template.startswith("medvlm") else extract_reference(text)


def read_evaluation(path: str | Path) -> Evaluation:
    """What `write_evaluation` wrote."""
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    return Evaluation(document["results"], document["template"], document["compat"])


def write_evaluation(folder: str | Path, evaluation: Evaluation, suffix: str = "") -> None:
    """Write evaluation{suffix}.json and accuracy{suffix}.png.

    The JSON begins as Med-R1's: `accuracy` in percent, `results`. `scores` holds ours as fractions, with intervals and counts.
    """
    scores = {"overall": evaluation.overall.as_dict(), "unanswered": evaluation.unanswered}
    for grouping in GROUPINGS:
        scores[grouping] = {name: score.as_dict() for name, score in evaluation.by(grouping).items()}
    settings = {"template": evaluation.template, "compat": evaluation.compat}
    document = {"accuracy": 100 * evaluation.overall.accuracy, **settings, "scores": scores, "results": evaluation.results}
    write_json(Path(folder) / f"evaluation{suffix}.json", document)
    write_whole(Path(folder) / f"accuracy{suffix}.png", as_png(accuracy_figure(evaluation)))
