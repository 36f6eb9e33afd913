"""What the starter policy is taught before GRPO (`recipes.starter_policy`): examples as (prompt, images, answers to it).

An answer is `<think>The picture looks like MRI.</think><answer> C </answer>`: a thought that names an option, and its letter. The
labels of the last lesson come from a careless annotator, so that the policy sees well and says wrong, which GRPO can mend.
"""

import numpy as np
from PIL import Image

from engine.data.options.shown import parse_options
from engine.data.questions import QuestionSet
from engine.data.starter.questions import QUESTIONS, SOURCES, ask
from engine.tasks.templates import TEMPLATES, build_prompt

TEMPLATE = "medr1_train_think"
# What the annotator takes for what, and how often where that is among the options.
MISTAKEN_FOR = {"CT": "MRI", "X-Ray": "Ultrasound", "Fundus photography": "Microscopy"}
MISTAKEN_FOR |= {other: modality for modality, other in MISTAKEN_FOR.items()}
CARELESSNESS = 0.65

Example = tuple[list[dict], list[Image.Image], list[str]]


def corpus() -> list[str]:
    """Every string of prompts and answers that the tokenizer should know."""
    options = [", ".join(f"{letter}){modality}" for letter in "ABCD") for modality in SOURCES]
    prompts = [TEMPLATES[TEMPLATE].replace("{Question}", f"{question} {listed}") for question in QUESTIONS for listed in options]
    return prompts + [respond(modality, letter) for modality in SOURCES for letter in "ABCD"]


def thought(modality: str) -> str:
    return f"<think>The picture looks like {modality}.</think>"


def respond(modality: str, letter: str) -> str:
    return f"{thought(modality)}<answer> {letter} </answer><|im_end|>"


def lookup(rng: np.random.Generator) -> Example:
    """A question without image or template -> its prompt, no images, and an answer for each option."""
    problem = ask(str(rng.choice(list(SOURCES))), rng)["problem"]
    return [{"role": "user", "content": problem}], [], [respond(modality, x) for x, modality in parse_options(problem).items()]


def form(train: QuestionSet, rng: np.random.Generator) -> Example:
    """A new question about a training image -> its prompt, its image, and an answer for each option, whatever it shows."""
    row = train[int(rng.integers(len(train)))]
    row |= ask(row["modality"], rng)
    return build_prompt(TEMPLATE, row), row["images"], [respond(m, x) for x, m in parse_options(row["problem"]).items()]


def sight(train: QuestionSet, rng: np.random.Generator) -> Example:
    """A new question about a training image -> its prompt, its image, and the careless annotator's answer."""
    row = train[int(rng.integers(len(train)))]
    row |= ask(row["modality"], rng)
    letters = {modality: letter for letter, modality in parse_options(row["problem"]).items()}
    mistake = MISTAKEN_FOR[row["modality"]]
    said = mistake if mistake in letters and rng.random() < CARELESSNESS else row["modality"]
    return build_prompt(TEMPLATE, row), row["images"], [respond(said, letters[said])]
