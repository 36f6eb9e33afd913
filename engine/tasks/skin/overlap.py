"""The overlap of a predicted region with the lesion: of the box itself, or of the mask that a segmentation model finds for it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from engine.data.masks.pair import read_mask
from engine.evaluation.mask_metrics import iou_score
from engine.tasks.skin.answers import box_iou, read_box

ASKS_BOX = ("box", "tagged")  # questions of engine.data.lesions
Box = tuple[float, ...]
Segment = Callable[[Image.Image, list[Box]], np.ndarray]  # an image and P boxes -> masks [P, H, W], bool


def box_reward(
    prompts: Any, completions: list[str], question_type: list[str], bbox: list[list[float] | None], **columns: Any
) -> list[float | None]:
    """Intersection over union of the text's box and the row's; None where no box is asked for."""
    asked = [gold is not None and question in ASKS_BOX for question, gold in zip(question_type, bbox, strict=True)]
    rows = zip(completions, bbox, asked, strict=True)
    return [box_iou(read_box(text), gold) if wanted else None for text, gold, wanted in rows]


class MaskReward:
    """Intersection over union of the row's mask and the one that `segment` finds for the text's box; None where the row has no
    mask or no box is asked for. A box reaches to the image's border at most; one outside of it earns 0."""

    __name__ = "mask_reward"

    def __init__(self, segment: Segment):
        self.segment = segment

    def __call__(
        self,
        prompts: Any,
        completions: list[str],
        question_type: list[str],
        mask: list[str | None],
        images: list[list[Image.Image]],
        **columns: Any,
    ) -> list[float | None]:
        asked: dict[str, list[int]] = {}  # the answers about each mask: its image is embedded once for all of them
        for i, (path, question) in enumerate(zip(mask, question_type, strict=True)):
            if path is not None and question in ASKS_BOX:
                asked.setdefault(path, []).append(i)
        rewards: list[float | None] = [None] * len(completions)
        for path, places in asked.items():
            found = self._overlaps([completions[i] for i in places], path, images[places[0]][0])
            for i, overlap in zip(places, found, strict=True):
                rewards[i] = overlap
        return rewards

    def _overlaps(self, texts: Sequence[str], path: str, image: Image.Image) -> list[float]:
        boxes = [_inside(read_box(text), image.size) for text in texts]
        distinct = [box for box in dict.fromkeys(boxes) if box is not None]
        if not distinct:
            return [0.0] * len(texts)
        truth = read_mask(path, image)
        found = dict(zip(distinct, self.segment(image, distinct), strict=True))
        return [0.0 if box is None else iou_score(found[box], truth) for box in boxes]


def _inside(box: Box | None, size: tuple[int, int]) -> Box | None:
    """The part of a box within an image of `size` (width, height); None where there is none."""
    if box is None:
        return None
    x1, y1, x2, y2 = max(0.0, box[0]), max(0.0, box[1]), min(box[2], float(size[0])), min(box[3], float(size[1]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
