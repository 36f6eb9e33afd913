"""Multiple-choice questions: the letter that a text names is right or wrong (Med-R1, MedVLM-R1).

The default reads the last well-formed `<answer>` and accepts every clear way to name an option (`engine.data.options.answers`);
where a template asks for a letter without tags, a text that is itself an answer (`C`, `C) CT`, `CT`) counts too, behind its
`</think>` if it has one. `engine.tasks.published` reads and rewards as the papers' code does.

All parsing is linear in the length of the model's text, whatever the text.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from engine.data.options.answers import read_option, read_tagged, tagged
from engine.data.rows import Rows
from engine.evaluation.score import Score
from engine.report.charts import accuracy_figure, as_png
from engine.report.content import Sample, ShownAnswer
from engine.rollout.answers import Answer, Answers
from engine.rollout.policy import Message
from engine.tasks.evaluation import Columns, Evaluation, instructive
from engine.tasks.rewards import text_of
from engine.tasks.task import Reward
from engine.tasks.templates import build_prompt

GROUPINGS = {"modality": "modality", "question_type": "question type"}  # a result's key -> the title of its table
_THINK_THEN_ANSWER = re.compile(r"</think>\s*<answer>")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class Scoring(Protocol):
    """Who reads answers and what they earn. `name` stands in evaluation files."""

    @property
    def name(self) -> str: ...

    def read(self, text: str, options: dict[str, str], template: str) -> str | None:
        """What the text answers, to be compared with the right letter; None where nothing was found."""

    def rewards(self, template: str) -> Sequence[Reward]:
        """Rewards named accuracy and format."""


@dataclass(frozen=True)
class ClearAnswers:
    """The default: see above."""

    name: str = "default"

    def read(self, text: str, options: dict[str, str], template: str) -> str | None:
        if tagged(text) is None and asks_for_a_bare_letter(template):
            return read_option(text.rpartition("</think>")[2], options)
        return read_tagged(text, options)

    def rewards(self, template: str) -> Sequence[Reward]:
        form = format_reward_of(template, format_reward, format_reward_nothink)
        return [named("accuracy", accuracy_reward), named("format", form)]


def letter(row: dict) -> str:
    """The answer to learn: the letter in its tags."""
    return f"<answer> {row['answer']} </answer>"


@dataclass
class MultipleChoice:
    """Rows of `engine.data.questions`, asked by a template of `engine.tasks.templates`.

    `target_of(row)` is the answer that supervised fine-tuning teaches.
    """

    template: str
    scoring: Scoring = field(default_factory=ClearAnswers)
    target_of: Callable[[dict], str] = letter
    reward_weights: Sequence[float] | None = None
    legend: str = ""

    @property
    def rewards(self) -> Sequence[Reward]:
        return self.scoring.rewards(self.template)

    def prompt(self, row: dict) -> list[Message]:
        return build_prompt(self.template, row)

    def target(self, row: dict) -> str:
        return self.target_of(row)

    def score(self, row: dict, answer: Answer) -> dict[str, Any]:
        """Med-R1's four keys of a result (`question` with the keys of its files), then ours."""
        extracted = self.scoring.read(answer.text, row["options"], self.template)
        return {
            "question": {"image": row["image_id"], "problem": row["problem"], "solution": row["solution"]},
            "ground_truth": row["solution"],
            "model_output": answer.text,
            "extracted_answer": extracted,
            "correct": extracted == row["answer"],
            **{key: row[key] for key in ("source", "row", *GROUPINGS)},
        }

    def evaluation(self, results: list[dict]) -> Evaluation:
        """Accuracy with its interval: overall, per modality, per question type (Med-R1, section 4)."""
        overall = Score.of([result["correct"] for result in results]).as_dict()
        unanswered = sum(result["extracted_answer"] is None for result in results) / len(results)
        groups: dict[str, Columns] = {key: _shares(results, key) for key in GROUPINGS}
        scores = {"overall": overall, "unanswered": unanswered, **groups}
        settings = {"template": self.template, "compat": self.scoring.name}
        return Evaluation(
            results,
            headline={key: overall[key] for key in ("accuracy", "low", "high", "num_samples")} | {"unanswered": unanswered},
            measures={"accuracy": overall},
            notes={"accuracy": f"{100 * unanswered:.1f} % without an answer"},
            tables={title: {name: {"accuracy": share} for name, share in groups[key].items()} for key, title in GROUPINGS.items()},
            details={"by_modality": groups["modality"]},
            summary={"accuracy": 100 * overall["accuracy"], **settings, "scores": scores},
        )

    def files(self, evaluation: Evaluation) -> dict[str, bytes | str]:
        sections: dict[str, dict[str, Any]] = {"": {"All questions": evaluation.measures["accuracy"]}}
        for title in GROUPINGS.values():
            sections[f"By {title}"] = {name: line["accuracy"] for name, line in evaluation.tables[title].items()}
        return {"accuracy{}.png": as_png(accuracy_figure(sections))}

    def shown(self, row: dict) -> tuple[str, str]:
        return row["problem"], f"{row['answer']}) {row['options'][row['answer']]}"

    def samples(self, evaluation: Evaluation, rows: Rows, answers: Answers) -> list[Sample]:
        samples = []
        for i in instructive(evaluation.results):
            row, result = rows[i], evaluation.results[i]
            answer = ShownAnswer(result["model_output"], {}, right=result["correct"])
            samples.append(Sample(row["images"][0], *self.shown(row), [answer]))
        return samples


def _shares(results: list[dict], grouping: str) -> Columns:
    """A share for each value of a grouping, in alphabetical order; questions without one are left out."""
    names = sorted({result[grouping] for result in results if result[grouping] is not None})
    return {name: Score.of([r["correct"] for r in results if r[grouping] == name]).as_dict() for name in names}


# ---- reading and rewarding --------------------------------------------------------------------------------------------


def asks_for_a_bare_letter(template: str) -> bool:
    """Whether the template wants a letter without tags."""
    return template.endswith(("zeroshot", "simple"))


def format_reward_of(template: str, think: Reward, nothink: Reward) -> Reward:
    """The one of the two that goes with the template."""
    return nothink if template.endswith("nothink") else think


def accuracy_reward(
    prompts: Any, completions: list[str], answer: list[str], options: list[dict[str, str]], **columns: Any
) -> list[float]:
    """1 where the last `<answer>` names the row's `answer` (`engine.data.options.answers`)."""
    return [float(read_tagged(text, choices) == gold) for text, gold, choices in zip(completions, answer, options, strict=True)]


def format_reward(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """1 for exactly one think block, then exactly one answer block, and nothing but white space around them."""
    return [float(is_think_answer(text.strip()) and _tag_counts(text) == (1, 1, 1, 1)) for text in completions]


def format_reward_nothink(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """1 for exactly one answer block, no think tag, and nothing but white space around it."""
    return [float(is_answer(text.strip()) and _tag_counts(text) == (0, 0, 1, 1)) for text in completions]


def _tag_counts(text: str) -> tuple[int, ...]:
    return tuple(text.count(tag) for tag in _TAGS)


def is_think_answer(text: str) -> bool:
    """`<think>.*?</think>\\s*<answer>.*?</answer>` over the whole text, dots matching line breaks; several blocks pass."""
    inner_end = len(text) - len("</answer>")
    outer = text.startswith("<think>") and text.endswith("</answer>")
    return outer and _THINK_THEN_ANSWER.search(text, len("<think>"), inner_end) is not None


def is_answer(text: str) -> bool:
    """`<answer>.*?</answer>` over the whole text, dots matching line breaks; several blocks pass."""
    return text.startswith("<answer>") and text.endswith("</answer>") and len(text) >= len("<answer></answer>")


def named(name: str, reward: Reward) -> Reward:
    """A function of texts as a reward under the name that its metrics carry."""
    function = partial(_of_texts, reward)
    function.__name__, function.__doc__ = name, reward.__doc__  # type: ignore[attr-defined]
    return function


def _of_texts(reward: Reward, prompts: Any, completions: Sequence[Any], **columns: Any) -> Sequence[float | None]:
    return reward(prompts=prompts, completions=[text_of(completion) for completion in completions], **columns)
