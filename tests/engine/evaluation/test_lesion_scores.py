"""Scores of lesions: scikit-learn's where it has them, intervals that hold what they should."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from engine.evaluation.lesion_scores import class_scores, mean_share

CLASSES = ["a", "b", "c"]


def test_a_case_by_hand():
    scores = class_scores(["a", "a", "a", "b"], ["a", "a", None, "c"], CLASSES)
    assert scores.recall == pytest.approx({"a": 2 / 3, "b": 0.0})
    assert scores.balanced_accuracy["accuracy"] == pytest.approx(1 / 3)
    assert scores.confusion == [[2, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]  # the last column: no diagnosis


@pytest.mark.parametrize("seed", range(3))
def test_balanced_accuracy_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    true = rng.choice(CLASSES, 200, p=[0.7, 0.2, 0.1]).tolist()
    called = [name if rng.random() < 0.6 else str(rng.choice(CLASSES)) for name in true]
    share = class_scores(true, called, CLASSES).balanced_accuracy
    assert share["accuracy"] == pytest.approx(balanced_accuracy_score(true, called), abs=1e-12)
    assert share["low"] < share["accuracy"] < share["high"]


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    """300 sets of 60 rows: 95 % intervals miss in about 15 of them (a bootstrap's are a little narrow)."""
    rng = np.random.default_rng(0)
    held = {"mean": 0, "balanced": 0}
    for _ in range(300):
        share = mean_share(rng.uniform(0, 1, 60))
        held["mean"] += share["low"] <= 0.5 <= share["high"]
        true = ["a"] * 40 + ["b"] * 20
        called = np.where(rng.random(60) < 0.7, true, "c").tolist()
        share = class_scores(true, called, CLASSES).balanced_accuracy
        held["balanced"] += share["low"] <= 0.7 <= share["high"]
    assert all(270 <= count <= 297 for count in held.values()), held


def test_what_does_not_vary_has_no_width():
    assert mean_share([0.25]) == {"accuracy": 0.25, "low": 0.25, "high": 0.25, "num_samples": 1}
    share = class_scores(["a", "b"], ["a", "b"], CLASSES).balanced_accuracy
    assert (share["accuracy"], share["low"], share["high"]) == (1, 1, 1)
