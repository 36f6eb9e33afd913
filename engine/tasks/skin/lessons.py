"""What the starter policy for skin lesions is taught before stage 1 (`recipes.skin_starter_policy`): prompt, images, answers to it.

It comes from a careless annotator, who takes some kinds of lesion for others and draws boxes that are too wide: the policy sees
well and says wrong. So stage 1 can mend what lesions are called, and stage 2 the boxes. Lesions are drawn as those of the starter
data are, anew each time, and on grounds of their own.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from engine.data.lesion_boxes import find_lesion, name_region
from engine.data.lesions import DIAGNOSES, QUESTIONS, ask, skin_prompt
from engine.data.starter.lesions import BODY_PARTS, draw_lesion, draw_radius

# What the annotator takes for what, and how often. Vascular lesions are always known.
MISTAKEN_FOR = {"mel": "nv", "akiec": "bcc", "bkl": "df"}
MISTAKEN_FOR |= {other: dx for dx, other in MISTAKEN_FOR.items()}
CARELESSNESS = 0.65
WIDENING = 0.35  # each side of a box lies up to this part of its width or height too far out
Example = tuple[list[dict], list[Image.Image], list[str]]


class LesionLessons:
    """`grounds`: grey values [H, W] on which lesions are drawn; `rng` decides which, and what is asked."""

    def __init__(self, grounds: Sequence[np.ndarray], rng: np.random.Generator):
        self.grounds, self.rng = grounds, rng

    def boxes(self) -> Example:
        """Asked for everything, the answer is the true box alone: where things are comes before what they are called."""
        record = self._draw()
        box = str([int(side) for side in record["bbox"]])
        return _prompt("box", record), record["images"], [f"{box}<|im_end|>"]

    def annotated(self) -> Example:
        """One of the questions, and the careless annotator's answer."""
        record = self._draw()
        if self.rng.random() < CARELESSNESS:
            record["dx"] = MISTAKEN_FOR.get(record["dx"], record["dx"])
        record |= {"diagnosis": DIAGNOSES[record["dx"]], "bbox": self._widened(record)}
        question = str(self.rng.choice(list(QUESTIONS)))
        return _prompt(question, record), record["images"], [f"{ask(question, record)[1]}<|im_end|>"]

    def corpus(self, count: int = 300) -> list[str]:
        """Questions and answers, and every name as often: what a tokenizer is trained on."""
        records = [self._draw() for _ in range(count)]
        texts = [" ".join(ask(question, record)) for record in records for question in QUESTIONS]
        return [*texts, *(f"{dx} {part}" for dx in DIAGNOSES.values() for part in BODY_PARTS)]

    def _draw(self) -> dict:
        rng = self.rng
        dx, ground = str(rng.choice(list(DIAGNOSES))), self.grounds[int(rng.integers(len(self.grounds)))]
        pixels, mask = draw_lesion(ground, dx, draw_radius(rng), rng)
        found = find_lesion(mask)
        assert found is not None  # a radius is pixels wide
        return {
            "images": [Image.fromarray(pixels)],
            "dx": dx,
            "diagnosis": DIAGNOSES[dx],
            "localization": str(rng.choice(BODY_PARTS)),
            "bbox": found.bbox,
            "spatial_description": f"lesion located in {name_region(found.bbox, mask.shape[::-1])} region",
        }

    def _widened(self, record: dict) -> list[float]:
        x1, y1, x2, y2 = record["bbox"]
        left, upper, right, lower = self.rng.uniform(0, WIDENING, 4) * np.tile((x2 - x1, y2 - y1), 2)
        width, height = record["images"][0].size
        return [max(0, x1 - left), max(0, y1 - upper), min(width, x2 + right), min(height, y2 + lower)]


def _prompt(question: str, record: dict) -> list[dict]:
    return skin_prompt({"images": record["images"], "problem": QUESTIONS[question]})
