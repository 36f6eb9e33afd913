"""What the small language model of Uni-MedVLM is taught before stage 1, without images, and the form that stage 5 starts from.

A pretrained language model can speak of what it is told, and reason in form when it is asked to. This one is told what an image
shows: words of its caption, in any order, stand where image tokens will be. So what stage 1 has to learn is to say the same with an
image. It has never said `<SEG>`: asked for a mask, it describes the lesion.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from engine.data.mecovqa.rows import MeCoVQA
from engine.tasks.mecovqa.reasoning import INSTRUCTION, ReasoningTask, reasoned

Example = tuple[list[dict], list[Image.Image], list[str]]
WORDS = 16  # in an image's place
CARELESSNESS = 0.5  # how often a reasoned answer is that to another question of its kind


class SceneLessons:
    """`captions` and `questions` about the same images; `end` ends an answer, `rng` decides what is asked."""

    def __init__(self, captions: MeCoVQA, questions: MeCoVQA, end: str, rng: np.random.Generator):
        self.captions = {record["image_id"]: record["answer"] for record in captions.records}
        self.questions = [record for record in questions.records if record["image_id"] in self.captions]
        self.closed = [record for record in self.questions if record["answer_type"] == "closed" and record["kind"] == "complex"]
        self.end, self.rng = end, rng

    def described(self) -> Example:
        """The caption, or the answer to a question, of an image in words."""
        record = self._one_of(self.questions)
        caption = self.captions[record["image_id"]]
        if self.rng.random() < 0.3:
            return [{"role": "caption", "content": f"{self._scene(caption)}\n"}], [], [caption + self.end]
        answer = record["answer"] if record["answer_type"] else caption
        return self._asked(record, ""), [], [answer + self.end]

    def reasoned(self) -> Example:
        """A closed question with the instruction of stage 5, and an answer in its form, often a careless one."""
        record = self._one_of(self.closed)
        return self._asked(record, INSTRUCTION), [], [careless(record, self.closed, self.rng) + self.end]

    def mixed(self) -> Example:
        """One of the two."""
        return self.reasoned() if self.rng.random() < 0.5 else self.described()

    def corpus(self) -> list[str]:
        """Every text, for a tokenizer."""
        texts = [f"{record['question']} {record['answer']}" for record in self.questions]
        return [*texts, *self.captions.values(), INSTRUCTION, reasoned("I see.", "")]

    def _asked(self, record: dict, instruction: str) -> list[dict]:
        region = self._scene(record["answer"]) if record["answer_type"] == "open" else ""
        question = record["question"].replace("[region]", f"[{region}]")
        return [{"role": "user", "content": f"{self._scene(self.captions[record['image_id']])}\n{question}{instruction}"}]

    def _scene(self, text: str) -> str:
        """Its words, each at least once, in any order."""
        words = text.rstrip(".").split()
        return " ".join(self.rng.permutation([*words, *self.rng.choice(words, max(0, WORDS - len(words)))]))

    def _one_of(self, records: list[dict]) -> dict:
        return records[int(self.rng.integers(len(records)))]


class FormLessons:
    """Stage 5's form, after stages that answered without it: closed questions of `rows` and their images, answered carelessly."""

    def __init__(self, rows: MeCoVQA, end: str, rng: np.random.Generator):
        self.rows, self.end, self.rng, self.task = rows, end, rng, ReasoningTask()
        self.closed = [i for i in range(len(rows)) if rows.record(i)["answer_type"] == "closed"]
        self.records = [rows.record(i) for i in self.closed]

    def __call__(self) -> Example:
        row = self.rows[self.closed[int(self.rng.integers(len(self.closed)))]]
        return self.task.prompt(row), row["images"], [careless(row, self.records, self.rng) + self.end]


def careless(record: dict, records: Sequence[dict], rng: np.random.Generator) -> str:
    """An answer in form, as often the record's own as that to another question of its kind, which may be the same."""
    like = [other for other in records if _kind(other) == _kind(record)]
    said = like[int(rng.integers(len(like)))]["answer"] if rng.random() < CARELESSNESS else record["answer"]
    return reasoned(f"I see {said}.", said)


def _kind(record: dict) -> str:
    """Questions whose answers could be mistaken for one another."""
    answer = record["answer"].lower()
    return "yes or no" if answer in ("yes", "no") else "shade" if answer in ("bright", "dark") else "modality"
