"""Starter lesions: where they lie is clear, and every place is about as frequent."""

from collections import Counter
from itertools import product

import numpy as np

from engine.data.masked_questions import load_masked_questions
from engine.data.positions import locate, read_positions
from engine.data.starter.masked_questions import build_lesions, draw_lesion


def test_hardly_a_lesion_lies_on_the_border_of_two_places():
    rng = np.random.default_rng(0)
    masks = [draw_lesion(rng.uniform(0, 255, (112, 112, 3)).astype(np.float32), rng)[1] for _ in range(100)]
    moved = [{locate(np.roll(mask, shift, (0, 1)))[0].place for shift in product((-2, 0, 2), repeat=2)} for mask in masks]
    assert sum(len(places) > 1 for places in moved) <= 5


def test_no_place_is_much_more_frequent_than_another():
    for split in ("train", "test"):
        rows = load_masked_questions(build_lesions(), split=split)
        counts = Counter(read_positions(record["answer"])[0].place for record in rows.records)
        assert len(counts) == 5 and all(0.12 <= count / len(rows) <= 0.28 for count in counts.values())
