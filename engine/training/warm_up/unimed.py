"""The small networks of Uni-MedVLM before its stage 1: a language model that was told what images show, towers that have seen some.

They are made once, in about two minutes on one CPU thread, and lie in the cache.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.mecovqa.captions import load_captions
from engine.data.mecovqa.rows import load_mecovqa
from engine.data.starter.folder import starter_folder
from engine.data.starter.unimed import build_starter_unimed
from engine.tasks.mecovqa.lessons import SceneLessons
from engine.training.warm_up.lessons import teach
from engine.training.warm_up.sight import teach_towers

VERSION = 2  # raise it with any change of what is taught
SEED = 0
BATCH = 32
DESCRIBED, REASONED, SEEN = 160, 80, 150  # steps of the lessons


def small_networks(build: Callable[[Iterable[str]], Any]) -> Path:
    """The checkpoint folder of the small networks; `build(corpus)` gives their policy, untaught."""
    data = build_starter_unimed()

    def make(folder: Path) -> None:
        taught(build, data).model.save_pretrained(folder)

    return starter_folder(None, f"{data.name}-networks-{VERSION}", "unimed.json", make)


def taught(build: Callable[[Iterable[str]], Any], data: Path) -> Any:
    """`build(corpus)`, after its lessons on the training rows of `data`."""
    captions, questions = load_captions(data), load_mecovqa(data)
    rng = np.random.default_rng(SEED)
    lessons = SceneLessons(captions, questions, "</s>", rng)
    policy = build(lessons.corpus())
    teach(policy, lessons.described, DESCRIBED, BATCH, "what images show", matrix_rate=0.02)
    teach(policy, lessons.mixed, REASONED, BATCH, "reasoning in form", matrix_rate=0.01)
    masked = questions.select([i for i in range(len(questions)) if questions.record(i)["kind"] == "grounding"])
    teach_towers(policy, captions, masked, steps=SEEN, learning_rate=3e-3, seed=SEED)
    policy.model.eval()
    return policy
