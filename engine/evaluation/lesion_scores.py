"""Scores of diagnoses and boxes over a set of lesions, with 95 % intervals of the percentile bootstrap.

    balanced accuracy = mean over the classes that occur of (right answers / rows of the class)
    IoU               = intersection over union of the predicted and the true region, a mean over rows

A row without a diagnosis has the class `NONE`: it is wrong, and a column of the confusion matrix. Intervals come of 2,000 sets
drawn with replacement, seeded, so that one evaluation always has the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Share = dict[str, Any]  # as `Score.as_dict` has it
NONE = "none"
DRAWS = 2000


@dataclass(frozen=True)
class ClassScores:
    """recall: {class that occurs: fraction}; confusion[i][j]: rows of class i that were called class j, `NONE` last."""

    balanced_accuracy: Share
    recall: dict[str, float]
    confusion: list[list[int]]


def class_scores(true: Sequence[str], predicted: Sequence[str | None], classes: Sequence[str]) -> ClassScores:
    """`true`, at least one: one of `classes` for each row."""
    from sklearn.metrics import confusion_matrix, recall_score  # a second, which flags do not need

    called = [NONE if name is None else name for name in predicted]
    occurring = [name for name in classes if name in set(true)]
    recall = recall_score(true, called, labels=occurring, average=None, zero_division=0)
    counts = confusion_matrix(true, called, labels=[*classes, NONE])[: len(classes)]
    drawn = np.random.default_rng(0).multinomial(len(true), counts.ravel() / len(true), DRAWS).reshape(DRAWS, *counts.shape)
    rows, right = drawn.sum(2), np.einsum("dii->di", drawn[:, :, : len(classes)])
    recalls = np.divide(right, rows, where=rows > 0, out=np.full(rows.shape, np.nan))
    low, high = np.nanquantile(np.nanmean(recalls, axis=1), (0.025, 0.975))
    share = {"accuracy": float(recall.mean()), "low": float(low), "high": float(high), "num_samples": len(true)}
    return ClassScores(share, dict(zip(occurring, map(float, recall), strict=True)), counts.tolist())


def mean_share(values: Sequence[float]) -> Share:
    """The mean of one or several numbers in 0..1, as a share."""
    from scipy.stats import bootstrap  # takes a quarter of a second to import

    numbers = np.asarray(values, dtype=float)
    low, high = numbers.min(), numbers.max()
    if low < high:
        found = bootstrap((numbers,), np.mean, n_resamples=DRAWS, method="percentile", rng=np.random.default_rng(0), batch=200)
        low, high = found.confidence_interval
    return {"accuracy": float(numbers.mean()), "low": float(low), "high": float(high), "num_samples": len(numbers)}
