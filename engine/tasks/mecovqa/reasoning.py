"""MeCoVQA's questions answered with a thought first, and rewarded as MedVLM-R1 is (arXiv:2502.19634): Uni-MedVLM's stage 5.

A question in words is asked with an instruction and answered `<think>...</think><answer>...</answer>`; a mask is asked for as it
was learned. An answer earns 1 where it is right and 1 for the form; what a mask earns is up to who adds a reward for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.data.options.answers import tagged
from engine.rollout.answers import Answer
from engine.rollout.policy import Message
from engine.tasks.evaluation import Evaluation
from engine.tasks.mecovqa.task import MeCoVQATask, answer_reward
from engine.tasks.multiple_choice import format_reward, named
from engine.tasks.task import Reward

INSTRUCTION = " Think in <think>...</think>, then answer in <answer>...</answer>."


def reasoned(thought: str, answer: str) -> str:
    """An answer in the form that is asked for."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def accuracy_reward(prompts: Any, completions: list[str], **columns: Any) -> list[float | None]:
    """`answer_reward` of what stands in the answer's tags, 0 without them; None where masks are the answer."""
    return answer_reward(prompts=prompts, completions=[tagged(text) or "" for text in completions], **columns)


def form_reward(prompts: Any, completions: list[str], answer_type: list[str | None], **columns: Any) -> list[float | None]:
    """1 for a thought and then an answer, each in its tags; None where masks are the answer."""
    scores = format_reward(prompts, completions)
    return [None if kind is None else score for kind, score in zip(answer_type, scores, strict=True)]


def reasoning_rewards() -> list[Reward]:
    return [named("accuracy", accuracy_reward), named("format", form_reward)]


@dataclass
class ReasoningTask(MeCoVQATask):
    """See above. `rewards`: of words; a reward of masks needs the model, and is added."""

    rewards: Sequence[Reward] = field(default_factory=reasoning_rewards)

    def prompt(self, row: dict) -> list[Message]:
        messages = super().prompt(row)
        if row["answer_type"] is None:
            return messages
        last = messages[-1]
        return [*messages[:-1], last | {"content": [*last["content"], {"type": "text", "text": INSTRUCTION}]}]

    def score(self, row: dict, answer: Answer) -> dict[str, Any]:
        read = answer if row["answer_type"] is None else replace(answer, text=tagged(answer.text) or "")
        result = super().score(row, read) | {"model_answer": answer.text}
        form = 0.0 if row["answer_type"] is None else float(format_reward(None, [answer.text])[0] or 0)
        return result | {"reward": result["iou"] if row["masks"] else result["correct"] + form}

    def evaluation(self, results: list[dict]) -> Evaluation:
        """`reward`, what the answers earn on average, comes first; masks earn their IoU."""
        found = super().evaluation(results)
        reward = {"reward": sum(result["reward"] for result in results) / len(results)}
        return replace(found, headline=reward | found.headline, measures=reward | found.measures)
