"""What the starter policy is taught before GRPO (`recipes.starter_policy`): examples as (prompt, images, answers to it).

An answer is `<think>The picture looks like MRI.</think><answer> C </answer>`: a thought that names an option, and its letter. The
labels of the last lesson come from a careless annotator, so that the policy sees well and says wrong, which GRPO can mend.
"""

import numpy as np
from PIL import Image, ImageOps

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


def right_response(row: dict) -> str:
    """To a row, unended."""
    return respond(row["options"][row["answer"]], row["answer"]).removesuffix("<|im_end|>")


def lookup(rng: np.random.Generator) -> Example:
    """A question without image or template -> its prompt, no images, and an answer for each option."""
    problem = ask(str(rng.choice(list(SOURCES))), rng)["problem"]
    return [{"role": "user", "content": problem}], [], [respond(modality, x) for x, modality in parse_options(problem).items()]


def look(train: QuestionSet, rng: np.random.Generator) -> Example:
    """A training image without a question -> its prompt, the image, and what it shows, in one answer."""
    row = train[int(rng.integers(len(train)))]
    return [{"role": "user", "content": [{"type": "image"}]}], [turned(row["images"][0], rng)], [f"{row['modality']}<|im_end|>"]


def form(train: QuestionSet, rng: np.random.Generator) -> Example:
    """A new question about a training image -> its prompt, its image, and an answer for each option, whatever it shows."""
    row = _asked(train, rng)
    return build_prompt(TEMPLATE, row), row["images"], [respond(m, x) for x, m in parse_options(row["problem"]).items()]


def sight(train: QuestionSet, rng: np.random.Generator) -> Example:
    """A new question about a training image -> its prompt, its image, and the careless annotator's answer."""
    row = _asked(train, rng)
    letters = {modality: letter for letter, modality in parse_options(row["problem"]).items()}
    mistake = MISTAKEN_FOR[row["modality"]]
    said = mistake if mistake in letters and rng.random() < CARELESSNESS else row["modality"]
    return build_prompt(TEMPLATE, row), row["images"], [respond(said, letters[said])]


def _asked(train: QuestionSet, rng: np.random.Generator) -> dict:
    """A training row with another question, and its image turned."""
    row = train[int(rng.integers(len(train)))]
    return row | ask(row["modality"], rng) | {"images": [turned(row["images"][0], rng)]}


def turned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square part of it, 60 to 100 % wide, in its size, turned by right angles and mirrored at random.

    Else a small tower learns where things lie in a source rather than what they look like, and held-out parts look otherwise.
    """
    side = int(image.width * rng.uniform(0.6, 1.0))
    x, y = rng.integers(image.width - side + 1, size=2).tolist()
    part = image.crop((x, y, x + side, y + side)).resize(image.size, Image.Resampling.BICUBIC).rotate(90 * int(rng.integers(4)))
    return ImageOps.mirror(part) if rng.random() < 0.5 else part
