"""How well the masks of an answer are those of its row.

A row's score is the mean over its masks:

    default      the i-th mask against the i-th true one, levels of 1/2 and more; one that is missing or too many stands against an
                 empty one; Dice and IoU of two empty masks are 1
    reference    as MedPLIB's evaluation: the first mask alone, probabilities above 0.1, IoU of two empty masks 0, and
                 Dice = 2 IoU / (1 + IoU)
"""

from collections.abc import Sequence

import numpy as np

from engine.evaluation.mask_metrics import dice_score, iou_score

THRESHOLDS = {"default": 128, "reference": 26}  # the lowest level that is mask, of 255: 0.5, and what is above 0.1
FOUND = 0.5  # a mask is found by one that overlaps more, as objects are in PASCAL VOC


def score_masks(levels: Sequence[np.ndarray], truths: Sequence[np.ndarray], compat: str) -> tuple[float, float]:
    """(Dice, IoU) of masks, [H, W] uint8 each, against the true ones, [H, W] bool, at least one.

    Raises ValueError for masks of another size.
    """
    for mask in levels:
        if mask.dtype != np.uint8 or mask.shape != truths[0].shape:
            raise ValueError(f"a mask is uint8 {truths[0].shape}, not {mask.dtype} {mask.shape}")
    empty = np.zeros(truths[0].shape, bool)
    found = [mask >= THRESHOLDS[compat] for mask in levels]
    if compat == "reference":
        found, truths = found[:1], truths[:1]
    count = max(len(found), len(truths))
    pairs = list(zip([*found, *[empty] * (count - len(found))], [*truths, *[empty] * (count - len(truths))], strict=True))
    if compat == "reference":
        ((mask, truth),) = pairs
        iou = iou_score(mask, truth) if (mask | truth).any() else 0.0
        return 2 * iou / (1 + iou), iou
    dice, iou = (float(np.mean([score(*pair) for pair in pairs])) for score in (dice_score, iou_score))
    return dice, iou


def dice_of_all(truths: Sequence[np.ndarray]) -> float:
    """What masks of all pixels would score."""
    return float(np.mean([dice_score(np.ones_like(truth), truth) for truth in truths]))


def dice_of_none(truths: Sequence[np.ndarray]) -> float:
    """What empty masks would score."""
    return float(np.mean([dice_score(np.zeros_like(truth), truth) for truth in truths]))
