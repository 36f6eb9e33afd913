"""What a mask, a class and a sentence cost (PRS-Med, arXiv:2505.11872). Sums over images want float32.

With p = sigmoid(logits), mask m and weights w = 1 + 5 |mean of m over 31 x 31 - m|, which are largest at edges, all sums over an
image's pixels, PraNet's structure loss (arXiv:2006.11392) is

    sum(w BCE) / sum(w)  +  1 - (sum(w p m) + 1) / (sum(w (p + m - p m)) + 1)

Shape letters: B batch, S side of the masks, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def structure_loss(logits: Tensor, masks: Tensor, edge_weights: bool = True) -> Tensor:
    """logits and masks [B, 1, S, S] -> mean over the batch.

    `edge_weights=False` is what PRS-Med's code computes: its weights cancel out of the cross entropy, not of the other term.
    """
    rows = F.avg_pool2d(masks, (31, 1), stride=1, padding=(15, 0))  # a square's mean is the mean of its rows' means
    weights = 1 + 5 * (F.avg_pool2d(rows, (1, 31), stride=1, padding=(0, 15)) - masks).abs()
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    bce = (weights * bce).sum((2, 3)) / weights.sum((2, 3)) if edge_weights else bce.mean()
    p = logits.sigmoid()
    both = (weights * p * masks).sum((2, 3))
    either = (weights * (p + masks)).sum((2, 3)) - both
    return (bce + 1 - (both + 1) / (either + 1)).mean()


def published_structure_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """`structure_loss` as PRS-Med's code computes it."""
    return structure_loss(logits, masks, edge_weights=False)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the batch of 1 - (2 sum(p m) + 1) / (sum(p) + sum(m) + 1), sums over an image's pixels."""
    p = logits.sigmoid()
    both, all_of_both = (p * masks).sum((1, 2, 3)), (p + masks).sum((1, 2, 3))
    return (1 - (2 * both + 1) / (all_of_both + 1)).mean()


def bce_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross entropy and Dice, as PRS-Med's paper has it."""
    return F.binary_cross_entropy_with_logits(logits, masks) + dice_loss(logits, masks)


MASK_LOSSES = {"structure": structure_loss, "published_structure": published_structure_loss, "bce_dice": bce_dice_loss}


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labels that are not -100. logits [..., V], labels [...]."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
