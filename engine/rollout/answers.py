"""What a model says about a row of a data set: a text, and a mask where the task asks for one."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.rollout.policy import Message, Policy
from engine.rollout.rollout import rollout
from engine.rollout.sampling import GREEDY, SamplingParams


@dataclass(frozen=True)
class Answer:
    """`mask`: [H, W] uint8 in the image's size, 0 to 255 for a probability of 0 to 1; `masks`: several such, in the order of the
    places in the text that they belong to. `details`: what else its result says.
    """

    text: str
    mask: np.ndarray | None = None
    masks: tuple[np.ndarray, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def levels(self) -> np.ndarray:
        """The mask; ValueError for an answer without one."""
        if self.mask is None:
            raise ValueError("a question about a mask was answered without one")
        return self.mask


Answers = Callable[[list[dict]], list[Answer]]  # opened rows -> an answer to each


class GreedyAnswers:
    """`policy`'s likeliest answers, at most `max_new_tokens` long, to the prompts that `prompt_of` makes of rows."""

    sampling = GREEDY

    def __init__(self, policy: Policy, prompt_of: Callable[[dict], list[Message]], max_new_tokens: int):
        self.policy, self.prompt_of, self.max_new_tokens = policy, prompt_of, max_new_tokens

    def __call__(self, rows: list[dict]) -> list[Answer]:
        encode = self.policy.processor.encode
        batch = self.policy.batch([encode(self.prompt_of(row), row["images"], row.get("image_id")) for row in rows])
        seeds = [self.seed_of(row) for row in rows]
        answers = rollout(self.policy, batch, self.sampling, num_generations=1, max_new_tokens=self.max_new_tokens, seeds=seeds)
        return [Answer(text) for text in answers.texts(self.policy.processor)]

    def seed_of(self, row: dict) -> int:
        """What decides a row's randomness."""
        return 0


class SampledAnswers(GreedyAnswers):
    """One answer to each row, drawn with `sampling`: by the seed and the row's place in its file, however rows are batched."""

    def __init__(self, *of: Any, sampling: SamplingParams, seed: int):
        super().__init__(*of)
        self.sampling, self.seed = sampling, seed

    def seed_of(self, row: dict) -> int:
        return zlib.crc32(f"{self.seed} {Path(row['source']).name} {row['row']}".encode())
