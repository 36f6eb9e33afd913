"""The lessons before stage 5 are about the form: their answers are in it, possible ones, and some of them wrong."""

import numpy as np

from engine.command.settings import DataArguments
from engine.data.mecovqa.splits import load_reasoning_splits
from engine.data.options.answers import tagged
from engine.tasks.mecovqa.lessons import FormLessons, careless
from engine.tasks.multiple_choice import format_reward

MODALITIES = {"CT", "MRI", "X-Ray", "Ultrasound", "Fundus photography", "Microscopy"}


def possible(question):
    if "bright or dark" in question:
        return {"bright", "dark"}
    return {"yes", "no"} if question.startswith(("Is there a lesion", "Does this image")) else MODALITIES


def test_lessons_in_form_have_possible_answers_of_which_some_are_wrong():
    lesson = FormLessons(load_reasoning_splits(DataArguments()).train, "</s>", np.random.default_rng(0))
    said = {}
    regions = 0
    for _ in range(120):
        prompt, images, (answer,) = lesson()
        parts = prompt[-1]["content"]
        question = "".join(part.get("text", "") for part in parts)
        assert len(images) == 1 and "<think>" in question
        assert answer.endswith("</s>") and format_reward(None, [answer.removesuffix("</s>")]) == [1.0]
        assert tagged(answer) in possible(question)
        of_region = [part for part in parts if part["type"] == "region"]
        assert all(np.asarray(part["mask"]).any() for part in of_region)
        regions += len(of_region)
        said.setdefault(question, set()).add(tagged(answer))
    assert 30 < regions < 80  # 300 of 660 questions
    assert {"yes", "no"} in said.values() and {"bright", "dark"} in said.values()


def test_every_other_lesson_is_careless():
    """A careless answer to a question of yes or no is right every other time: three quarters of all are."""
    rng = np.random.default_rng(1)
    records = [{"answer": answer} for answer in ("yes", "no", "CT", "bright", "no", "yes", "MRI", "dark")]
    asked = [records[int(rng.integers(2))] for _ in range(600)]
    right = sum(tagged(careless(record, records, rng)) == record["answer"] for record in asked)
    assert 410 < right < 490
