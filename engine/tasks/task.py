"""A task: what is asked about a row, what counts as right, and what a report shows of it. One module a task.

Runs and trainers know tasks by this protocol alone, so that any of them trains and evaluates any task that its model can answer.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engine.data.rows import Rows
from engine.report.content import Sample
from engine.rollout.answers import Answer, Answers
from engine.rollout.policy import Message
from engine.tasks.evaluation import Evaluation

# TRL's form: f(prompts, completions, **columns) -> a number for each completion, None where it does not apply: see
# engine/tasks/rewards.py. Its __name__ is that of its metric.
Reward = Callable[..., Sequence[float | None]]


class Task(Protocol):
    """`row` is always an opened row of the task's data set, `result` what `score` gave."""

    @property
    def rewards(self) -> Sequence[Reward]:
        """What an answer earns in GRPO, to be summed."""

    @property
    def reward_weights(self) -> Sequence[float] | None:
        """None: all 1."""

    @property
    def legend(self) -> str:
        """What is drawn over the images of `samples`."""

    def prompt(self, row: dict) -> list[Message]:
        """The chat messages that ask about the row."""

    def target(self, row: dict) -> str:
        """The answer that supervised fine-tuning teaches."""

    def score(self, row: dict, answer: Answer) -> dict[str, Any]:
        """How the answer did, in JSON's types but for keys that begin with an underscore, which files leave out."""

    def evaluation(self, results: list[dict]) -> Evaluation:
        """What the results of all rows, in their order, say together."""

    def files(self, evaluation: Evaluation) -> dict[str, bytes | str]:
        """Files to lie beside the evaluation's, by a name with a `{}` for its suffix: a chart, a table."""

    def shown(self, row: dict) -> tuple[str, str]:
        """The question and the true answer, as a reader wants them."""

    def samples(self, evaluation: Evaluation, rows: Rows, answers: Answers) -> list[Sample]:
        """A few instructive answers; `answers` answers again where a picture needs it."""
