"""Segment everything: a grid of points over the image, the good masks kept, duplicates suppressed.

TinySAM's hierarchical sampling (arXiv 2312.13789, section 3.3) asks a quarter of the grid's points along each side first.
Where such a mask is sure of a pixel (logit above `SURE`) no further point is asked; the others are asked in a second round.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.sam.predictor import Predictor

SURE = 8.5  # logit; TinySAM's high-score threshold
STABILITY_OFFSET = 1.0  # logits


PIXELS_AT_ONCE = 1 << 25  # of full-size masks that are looked at together: 128 MB of logits
logger = logging.getLogger(__name__)


@dataclass
class Segment:
    """`mask` is unpacked whenever it is asked for: kept whole, hundreds of masks of a photograph are gigabytes."""

    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, ends included
    point: tuple[float, float]  # the prompt, (x, y) in pixels
    predicted_iou: float
    stability: float  # IoU of the mask at logits of +1 and -1
    size: tuple[int, int]  # H, W of the image
    packed: np.ndarray  # the mask within its box, row by row, eight pixels a byte

    @property
    def mask(self) -> np.ndarray:
        """[H, W] bool."""
        x1, y1, x2, y2 = self.box
        height, width = y2 - y1 + 1, x2 - x1 + 1
        mask = np.zeros(self.size, bool)
        mask[y1 : y2 + 1, x1 : x2 + 1] = np.unpackbits(self.packed, count=height * width).reshape(height, width)
        return mask


def segment_everything(
    predictor: Predictor,
    image: Image.Image | np.ndarray,
    *,
    points_per_side: int = 32,
    hierarchical: bool = True,
    points_per_batch: int = 16,
    min_iou: float = 0.88,
    min_stability: float = 0.95,
    max_overlap: float = 0.7,
) -> list[Segment]:
    """Segments of the image, best predicted IoU first; no two boxes overlap by more than `max_overlap` (IoU).

    A warning says so where there is none. `points_per_side` must be a multiple of 4 where `hierarchical`. Thresholds and defaults
    are SAM's and TinySAM's.
    """
    if hierarchical and points_per_side % 4:
        raise ValueError(f"points_per_side must be a multiple of 4 for hierarchical sampling, not {points_per_side}")
    predictor.set_image(image)
    height, width = predictor.frame.original
    covered = torch.zeros(height, width, dtype=torch.bool, device=predictor.device)
    kept: list[Segment] = []
    highest = 0.0

    def ask(points: Tensor) -> None:
        nonlocal highest
        points = points * points.new_tensor([width, height])
        for start in range(0, len(points), points_per_batch):
            batch = points[start : start + points_per_batch]
            found, best = _good_segments(predictor, batch, min_iou, min_stability, covered)
            kept.extend(found)
            highest = max(highest, best)

    if hierarchical:
        ask(point_grid(points_per_side // 4))
        ask(uncovered_points(points_per_side, covered))
    else:
        ask(point_grid(points_per_side))

    if not kept:
        logger.warning(
            "no segment: the best mask has a predicted IoU of %.2f (expected more than %g, and a stability of at least %g)",
            *(highest, min_iou, min_stability),
        )
        return []
    boxes, scores = torch.tensor([segment.box for segment in kept]), torch.tensor([segment.predicted_iou for segment in kept])
    return [kept[i] for i in suppress_overlaps(boxes, scores, max_overlap).tolist()]


def point_grid(per_side: int) -> Tensor:
    """[per_side^2, 2] centres (x, y) of a grid of cells, in 0-1."""
    line = (torch.arange(per_side) + 0.5) / per_side
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).flatten(0, 1)


def uncovered_points(per_side: int, covered: Tensor) -> Tensor:
    """The points i / per_side, 0 < i < per_side, of the second round: not asked yet and not `covered` ([H, W] bool)."""
    index = torch.arange(1, per_side)
    x, y = torch.meshgrid(index, index, indexing="xy")
    asked = (x % 4 == 2) & (y % 4 == 2)  # the centres of the coarse cells
    height, width = covered.shape
    sure = covered.cpu()[y * height // per_side, x * width // per_side]
    return torch.stack([x, y], dim=-1)[~asked & ~sure] / per_side


@torch.inference_mode()
def _good_segments(
    predictor: Predictor, points: Tensor, min_iou: float, min_stability: float, covered: Tensor
) -> tuple[list[Segment], float]:
    """The masks that pass, and the highest predicted IoU of all; `covered` gains the pixels that they are sure of."""
    labels = torch.ones(len(points), 1)
    low_res, iou = predictor.decode(points=points[:, None], labels=labels, multimask_output=True)
    points = points.to(iou.device).repeat_interleave(iou.shape[1], 0)
    low_res, iou = low_res.flatten(0, 1), iou.flatten()

    # Only masks that pass the predicted IoU are brought to full size, few at a time.
    segments = []
    height, width = covered.shape
    good = (iou > min_iou).nonzero().flatten()
    for some in good.split(max(1, PIXELS_AT_ONCE // (height * width))) if len(good) else ():
        logits = predictor.frame.masks(low_res[some][None])[0]
        stability = _stability(logits)
        stable = (stability >= min_stability) & (logits > 0).flatten(1).any(1)
        logits, some, stability = logits[stable], some[stable], stability[stable]
        covered |= (logits > SURE).any(0)
        masks = logits > 0
        for mask, box, i, steadiness in zip(masks, mask_boxes(masks).tolist(), some.tolist(), stability.tolist(), strict=True):
            x1, y1, x2, y2 = box
            packed = np.packbits(mask[y1 : y2 + 1, x1 : x2 + 1].cpu().numpy())
            x, y = points[i].tolist()
            segments.append(Segment((x1, y1, x2, y2), (x, y), iou[i].item(), steadiness, (height, width), packed))
    return segments, iou.max().item()


def _stability(logits: Tensor) -> Tensor:
    """[N, H, W] -> [N]: the mask at the higher threshold lies inside that at the lower one, so their IoU is a ratio of areas."""
    inner, outer = ((logits > offset).flatten(1).sum(1) for offset in (STABILITY_OFFSET, -STABILITY_OFFSET))
    return inner / outer.clamp(min=1)


def mask_boxes(masks: Tensor) -> Tensor:
    """[N, H, W] bool, none empty -> [N, 4] x1, y1, x2, y2, ends included."""
    rows, columns = masks.any(2).long(), masks.any(1).long()
    last = torch.tensor(masks.shape[1:], device=masks.device) - 1
    x1, y1 = columns.argmax(1), rows.argmax(1)
    return torch.stack([x1, y1, last[1] - columns.flip(1).argmax(1), last[0] - rows.flip(1).argmax(1)], dim=1)


def suppress_overlaps(boxes: Tensor, scores: Tensor, max_overlap: float) -> Tensor:
    """Greedy non-maximum suppression: indices kept of [N, 4] boxes, best score first."""
    order, boxes = scores.argsort(descending=True, stable=True), boxes.float()
    low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlap = shared / (area[:, None] + area - shared).clamp(min=1e-9)
    keep: list[int] = []
    for i in order.tolist():
        if not keep or overlap[i, keep].max() <= max_overlap:
            keep.append(i)
    return torch.tensor(keep, dtype=torch.long)
