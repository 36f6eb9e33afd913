"""Accuracy of multiple-choice answers with its 95 % interval: overall, per modality, per question type (Med-R1, section 4).

    p = correct / n,  interval: Wilson's score interval, which stays inside [0, 1] and holds for small n and p near 0 or 1

An answer is read by `engine.rewards.parse_answer`; with the zero-shot template, which asks for a letter without tags, a text that
is itself an answer (`C`, `C) CT`, `CT`) counts too. `compat="reference"` reads as Med-R1's test scripts do, each in its own way:
think takes the word in the first `<answer>`; no-think that one where the text mentions "answer", else the text itself; zero-shot
takes the text itself. There the word must equal the letter exactly.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scipy.stats import binomtest
from tqdm.auto import tqdm

from engine.charts import accuracy_figure, as_png
from engine.data.options import match_option
from engine.data.templates import build_prompt
from engine.files import write_json, write_whole
from engine.processes import gather, my_share
from engine.rewards import extract_reference, parse_answer

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
    prompt's images. `template` is a name in `engine.data.templates.TEMPLATES` or a function from a row to its messages.
    Where processes were started together the questions are divided among them, and every process returns the whole.
    """
    prompt_of = partial(build_prompt, template) if isinstance(template, str) else template
    name = _name_of(prompt_of)
    records = [questions.record(i) for i in range(len(questions))]
    # Questions about one image lie together, and beside those of its folder, whose images are mostly of one size.
    mine = my_share(sorted(range(len(questions)), key=lambda i: records[i]["image_id"]))
    texts = {}
    with tqdm(total=len(mine), desc="evaluating", unit="question", disable=not progress, leave=False) as bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            rows = [questions[i] for i in batch]
            keys = [row["image_id"] for row in rows]
            answers = answer_fn([prompt_of(row) for row in rows], [row["images"] for row in rows], image_keys=keys)
            texts |= zip(batch, answers, strict=True)
            bar.update(len(batch))
    texts = gather(texts)
    return Evaluation([_result(record, texts[i], name, compat) for i, record in enumerate(records)], name, compat)


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
    """What `text` answers: a letter of `options`, or with `compat="reference"` what Med-R1's script for the template reads."""
    zero_shot = template.endswith("zeroshot")
    if compat == "default":
        tagged = parse_answer(text, options)
        return match_option(text, options) if zero_shot and tagged is None else tagged
    if zero_shot or template.endswith("nothink") and "answer" not in text:
        return text
    return extract_reference(text)


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
