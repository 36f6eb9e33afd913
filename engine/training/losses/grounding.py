"""What a drawn mask costs (MedPLIB, arXiv:2412.09278; its code's constants).

With p = sigmoid(logits) and mask m, sums and means over the pixels of one mask:

    bce    mean of the binary cross entropy
    dice   1 - (2 sum(p m) + e) / (sum(p) + sum(m) + e),   e = 1e-6
    iou    ((sum(p m) + e) / (sum(p + m - p m) + e) - the IoU that the model expects)^2,   e = 1e-7
    focal  mean of a_t (1 - p_t)^2 BCE,   a_t = 1/4 where m is 1, 3/4 elsewhere; p_t = p where m is 1, 1 - p elsewhere

Letters: M masks of one size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TERMS = ("bce", "dice", "iou", "focal")
ALPHA, GAMMA = 0.25, 2
DICE_EPSILON, IOU_EPSILON = 1e-6, 1e-7


def mask_terms(logits: Tensor, masks: Tensor, expected_iou: Tensor) -> Tensor:
    """logits and masks (0 or 1) [M, height, width], expected_iou [M] -> [M, 4], the TERMS of each mask."""
    p = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    both, sizes = (p * masks).sum((1, 2)), (p + masks).sum((1, 2))
    dice = 1 - (2 * both + DICE_EPSILON) / (sizes + DICE_EPSILON)
    iou = ((both + IOU_EPSILON) / (sizes - both + IOU_EPSILON) - expected_iou).square()
    right = p * masks + (1 - p) * (1 - masks)
    alpha = ALPHA * masks + (1 - ALPHA) * (1 - masks)
    focal = alpha * (1 - right) ** GAMMA * bce
    return torch.stack([bce.mean((1, 2)), dice, iou, focal.mean((1, 2))], 1)
