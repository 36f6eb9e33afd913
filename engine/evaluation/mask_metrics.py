"""How well a soft mask matches the truth: the measures of PRS-Med's tables (the PraNet protocol), and plain Dice and IoU.

    P: the prediction [H, W] in 256 levels, G: the truth (0 or 1), t_k = linspace(1, 0, 256), B_k = [P >= t_k]
    mDice = mean over k of the mean over images of  2 |B_k G| / (|B_k| + |G|),   mIoU likewise  |B_k G| / |B_k + G|
    dice, iou: B = [P >= 1/2] only, 1 where both B and G are empty
    s_measure  (S_object + S_region) / 2          structure, Fan et al., ICCV 2017, arXiv:1708.00786
    e_measure  mean over k of E(B_k, G)           enhanced alignment, Fan et al., IJCAI 2018, arXiv:1805.10421
    weighted_f                                    Margolin et al., CVPR 2014
    mae        mean |P - G|

As published: where B_k and G do not meet, all of a threshold's measures are 0 (the specificity too, and Dice of two empty masks);
E divides by H W - 1, so a perfect mask has slightly more than 1. The published "mDice" is this mean over thresholds, and not
the mean of per-image Dice scores. All thresholds come out of two histograms, so a 1024 x 1024 mask takes one pass and not 256.
"""

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

THRESHOLDS = np.linspace(1, 0, 256)
# A level v passes the thresholds from this place on; compared as the published code does, v / 255 >= t in doubles.
FIRST_PASSED = np.array([np.argmax(level / 255 >= THRESHOLDS) for level in range(256)])
EPSILON = np.finfo(np.float64).eps
SWEPT = ("dice", "iou", "sensitivity", "specificity", "e_measure")
NAMES = ("mDice", "mIoU", "dice", "iou", "s_measure", "e_measure", "weighted_f", "mae")


def mask_levels(probability: np.ndarray, stretched: bool = False) -> np.ndarray:
    """[H, W] of 0-1 -> the nearest of 256 levels, uint8: what a PNG keeps.

    `stretched`: the lowest value goes to 0 and the highest to 1 first; a constant mask becomes 0.
    """
    if stretched:
        low, high = float(probability.min()), float(probability.max())
        probability = (probability - low) / (high - low) if high > low else np.zeros_like(probability)
    return np.round(np.clip(probability, 0, 1) * 255).astype(np.uint8)


def dice_score(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two masks (bool, one shape); 1 where both are empty."""
    size = mask.sum() + truth.sum()
    return float(2 * (mask & truth).sum() / size) if size else 1.0


def iou_score(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks (bool, one shape); 1 where both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def score_mask(levels: np.ndarray, truth: np.ndarray) -> dict:
    """All measures of one image. levels: [H, W] uint8 (see `mask_levels`); truth: [H, W] bool.

    `sweep` holds an array of 256 (a value a threshold) for each name in SWEPT, the rest are numbers.
    """
    if levels.dtype != np.uint8 or levels.shape != truth.shape or levels.ndim != 2:
        raise ValueError(f"levels [H, W] uint8 and truth of its shape, not {levels.dtype} {levels.shape} and {truth.shape}")
    truth = truth.astype(bool)
    inside, outside = (np.bincount(levels[where], minlength=256) for where in (truth, ~truth))
    hit, false = (np.bincount(FIRST_PASSED, weights=counts, minlength=256).cumsum() for counts in (inside, outside))
    half, soft = levels >= 128, levels / 255
    either = (half | truth).sum()
    return {
        "sweep": _sweep(hit, false, int(truth.sum()), truth.size),
        "dice": dice_score(half, truth),
        "iou": float((half & truth).sum() / either) if either else 1.0,
        "s_measure": _s_measure(soft, truth),
        "weighted_f": _weighted_f(soft, truth),
        "mae": float(np.abs(soft - truth).mean()),
    }


def _sweep(hit: np.ndarray, false: np.ndarray, area: int, pixels: int) -> dict[str, np.ndarray]:
    """The measures at each threshold from the counts of true and false positives there."""
    missed, rest = area - hit, pixels - area - false
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = {
            "dice": 2 * hit / (area + hit + false),
            "iou": hit / (area + false),
            "sensitivity": hit / area,
            "specificity": rest / (rest + false) if area < pixels else np.ones(256),
        }
    rates = {name: np.where(hit > 0, values, 0.0) for name, values in rates.items()}
    rates["e_measure"] = _e_measures(hit, false, missed, rest, area, pixels)
    return rates


def _e_measures(hit, false, missed, rest, area: int, pixels: int) -> np.ndarray:
    """Enhanced alignment of binary maps: its matrix has one value for each of the four kinds of pixels."""
    if area == 0:
        total = rest
    elif area == pixels:
        total = hit
    else:
        mean_truth, mean_map = area / pixels, (hit + false) / pixels
        total = 0.0
        for count, in_truth, in_map in ((hit, 1, 1), (false, 0, 1), (missed, 1, 0), (rest, 0, 0)):
            a, b = in_truth - mean_truth, in_map - mean_map
            total = total + count * (2 * a * b / (a * a + b * b + EPSILON) + 1) ** 2 / 4
    return total / (pixels - 1 + EPSILON)


def _s_measure(soft: np.ndarray, truth: np.ndarray) -> float:
    share = truth.mean()
    if share in (0, 1):
        return float(soft.mean() if share else 1 - soft.mean())
    of_object = share * _object_score(soft[truth]) + (1 - share) * _object_score(1 - soft[~truth])
    y, x = (int(places.mean().round()) for places in np.nonzero(truth))
    quarters = [(slice(*rows), slice(*columns)) for rows in ((0, y), (y, None)) for columns in ((0, x), (x, None))]
    of_region = sum(soft[part].size / soft.size * _similarity(soft[part], truth[part]) for part in quarters if soft[part].size)
    return float(max(0.0, (of_object + of_region) / 2))


def _object_score(values: np.ndarray) -> float:
    mean = values.mean()
    return 2 * mean / (mean**2 + 1 + values.std() + EPSILON)


def _similarity(soft: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of a part as a whole."""
    a, b, degrees = soft.mean(), truth.mean(), soft.size - 1 + EPSILON
    variances = (((soft - a) ** 2).sum() + ((truth - b) ** 2).sum()) / degrees
    above = 4 * a * b * ((soft - a) * (truth - b)).sum() / degrees
    below = (a**2 + b**2) * variances
    return above / (below + EPSILON) if above != 0 else float(below == 0)


def _weighted_f(soft: np.ndarray, truth: np.ndarray) -> float:
    """F1 whose errors weigh less beside correct pixels (a 7 x 7 Gaussian) and more far from the object; 0 without an object."""
    if not truth.any():
        return 0.0
    error = np.abs(soft - truth)
    distance, nearest = ndimage.distance_transform_edt(~truth, return_indices=True)
    spread = np.where(truth, error, error[tuple(nearest)])  # a background pixel has the error of the object pixel nearest to it
    offsets = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 5**2))
    for axis in (0, 1):
        spread = ndimage.correlate1d(spread, offsets / offsets.sum(), axis=axis, mode="nearest")
    weighted = np.where(truth, np.minimum(error, spread), error * (2 - np.exp(np.log(0.5) / 5 * distance)))
    hit = truth.sum() - weighted[truth].sum()
    recall = 1 - weighted[truth].mean()
    precision = hit / (hit + weighted[~truth].sum() + EPSILON)
    return float(2 * recall * precision / (recall + precision + EPSILON))


def summarise(scores: Iterable[dict]) -> dict[str, float]:
    """The measures of a data set from those of its images: NAMES, then the published table's other columns."""
    scores = list(scores)
    columns = {name: np.mean([score["sweep"][name] for score in scores], axis=0) for name in SWEPT}
    table = {"mDice": columns["dice"].mean(), "mIoU": columns["iou"].mean()}
    table |= {name: np.mean([score[name] for score in scores]) for name in ("dice", "iou", "s_measure")}
    table["e_measure"] = columns["e_measure"].mean()
    table |= {name: np.mean([score[name] for score in scores]) for name in ("weighted_f", "mae")}
    table |= {f"max_{name}": column.max() for name, column in columns.items()}
    table |= {f"mean_{name}": columns[name].mean() for name in ("sensitivity", "specificity")}
    return {name: float(value) for name, value in table.items()}
