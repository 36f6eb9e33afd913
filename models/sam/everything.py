"""Segment everything: a grid of points over the image, the good masks kept, duplicates suppressed.

TinySAM's hierarchical sampling (arXiv 2312.13789, section 3.3) asks a quarter of the grid's points along each side first.
Where such a mask is sure of a pixel (logit above `SURE`) no further point is asked; the others are asked in a second round.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.sam.predictor import Predictor

SURE = 8.5  # logit; TinySAM's high-score threshold
STABILITY_OFFSET = 1.0  # logits


@dataclass
class Segment:
    mask: np.ndarray  # [H, W] bool
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, ends included
    point: tuple[float, float]  # the prompt, (x, y) in pixels
    predicted_iou: float
    stability: float  # IoU of the mask at logits of +1 and -1


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

    `points_per_side` must be a multiple of 4 where `hierarchical`. Thresholds and defaults are SAM's and TinySAM's.
    """
    if hierarchical and points_per_side % 4:
        raise ValueError(f"points_per_side must be a multiple of 4 for hierarchical sampling, not {points_per_side}")
    predictor.set_image(image)
    height, width = predictor.frame.original
    kept, covered = [], torch.zeros(height, width, dtype=torch.bool, device=predictor.device)

    def ask(points: Tensor) -> None:
        points = points * points.new_tensor([width, height])
        for start in range(0, len(points), points_per_batch):
            batch = points[start : start + points_per_batch]
            kept.append(_good_segments(predictor, batch, min_iou, min_stability, covered))

    if hierarchical:
        ask(point_grid(points_per_side // 4))
        ask(uncovered_points(points_per_side, covered))
    else:
        ask(point_grid(points_per_side))

    masks, boxes, iou, stability, points = (torch.cat(parts).cpu() for parts in zip(*kept, strict=True))
    best = suppress_overlaps(boxes, iou, max_overlap)
    return [
        Segment(masks[i].numpy(), tuple(boxes[i].tolist()), tuple(points[i].tolist()), iou[i].item(), stability[i].item())
        for i in best.tolist()
    ]


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
def _good_segments(predictor: Predictor, points: Tensor, min_iou: float, min_stability: float, covered: Tensor) -> tuple:
    """(masks, boxes, iou, stability, points) of the masks that pass; `covered` gains the pixels they are sure of."""
    labels = torch.ones(len(points), 1)
    low_res, iou = predictor.decode(points=points[:, None], labels=labels, multimask_output=True)
    points = points.to(iou.device).repeat_interleave(iou.shape[1], 0)
    low_res, iou = low_res.flatten(0, 1), iou.flatten()

    # Only masks that pass the predicted IoU are brought to full size.
    good = iou > min_iou
    logits = predictor.frame.masks(low_res[good][None])[0] if good.any() else low_res.new_zeros(0, *covered.shape)
    stability = _stability(logits)
    stable = (stability >= min_stability) & (logits > 0).flatten(1).any(1)
    logits = logits[stable]
    covered |= (logits > SURE).any(0)
    masks = logits > 0
    return masks, mask_boxes(masks), iou[good][stable], stability[stable], points[good][stable]


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
