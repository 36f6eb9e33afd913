"""A segmenter that is compiled in seconds, with the inputs and outputs of a SAM, and what Python makes of its prompts."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.exported import Exported, Part
from models.sam.export import LABELS
from models.sam.frame import Frame, as_pixels
from models.sam.sam import PIXEL_MEAN, PIXEL_STD, normalised

SIZE, CELLS, SIDE = 64, 16, 32  # of the input, the embedding and the masks


class Encoder(nn.Module):
    """[1, 3, S, S] -> [1, 4, 16, 16]"""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, image):
        return self.project(image).tanh()


class Decoder(nn.Module):
    """A mask is where the image is like what lies under the prompt's points, and near to them."""

    def __init__(self):
        super().__init__()
        self.kind = nn.Embedding(5, 4)
        self.sharpness = nn.Parameter(torch.tensor([6.0, 2.0]))

    def forward(self, image_embeddings, point_coords, point_labels):
        image_embeddings, places = image_embeddings.float(), point_coords / SIZE * 2 - 1  # [P, T, 2]
        under = F.grid_sample(image_embeddings.expand(places.shape[0], -1, -1, -1), places[:, :, None], align_corners=False)
        query = (under[..., 0].transpose(1, 2) + self.kind(point_labels.long() + 1)).mean(1)  # [P, 4]
        line = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
        grid = torch.stack([line.expand(SIDE, SIDE), line[:, None].expand(SIDE, SIDE)], dim=-1)
        far = (grid - places.mean(1)[:, None, None]).square().sum(-1)
        like = torch.einsum("pc,chw->phw", query, F.interpolate(image_embeddings, (SIDE, SIDE), mode="bilinear")[0])
        masks = (1 + self.sharpness[1] * like - self.sharpness[0] * far)[:, None]
        return masks, masks.sigmoid().mean((-2, -1))


@dataclass
class SmallSegmenter:
    """`normalisation` and `fit` are those of `models.sam.sam.Sam`; `dtype` is the encoder's."""

    normalisation: str = "min_max"
    fit: str = "corner"
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        torch.manual_seed(7)
        self.encoder, self.decoder = Encoder().eval().to(self.dtype), Decoder().eval()

    @torch.no_grad()
    def segment(self, image, prompts):
        """Of each prompt, a pair of a box and points as (x, y, label): the mask [H, W] and its IoU, as `models.sam` would."""
        pixels = as_pixels(image)
        frame = Frame.fit(pixels.shape[:2], SIZE, self.fit)
        embedding = self.encoder(frame.pad(normalised(frame.resize(pixels), self.normalisation))[None].to(self.dtype))
        answers = []
        for box, points in prompts:
            rows = [(x, y, LABELS["inside"] if label else LABELS["outside"]) for x, y, label in points]
            if box:
                rows += [(*box[:2], LABELS["box_top_left"]), (*box[2:], LABELS["box_bottom_right"])]
            coords = frame.points(torch.tensor([row[:2] for row in rows], dtype=torch.float32))
            labels = torch.tensor([float(row[2]) for row in rows])
            if not box:
                coords, labels = torch.cat([coords, torch.zeros(1, 2)]), torch.cat([labels, torch.tensor([LABELS["no_box"]])])
            masks, iou = self.decoder(embedding, coords[None], labels[None])
            answers.append(((frame.masks(masks)[0, 0] > 0).numpy(), iou.item()))
        return answers

    def exported(self):
        def image(sizes, generator):
            return {"image": torch.rand(1, 3, SIZE, SIZE, generator=generator).to(self.dtype)}

        def prompts(sizes, generator):
            P, T = sizes["prompts"], sizes["points"]
            return {
                "image_embeddings": torch.randn(1, 4, CELLS, CELLS, generator=generator).to(self.dtype),
                "point_coords": torch.rand(P, T, 2, generator=generator) * SIZE,
                "point_labels": torch.randint(-1, 4, (P, T), generator=generator).float(),
            }

        embedding, points = (1, 4, CELLS, CELLS), ("prompts", "points")
        decoder_inputs = {"image_embeddings": embedding, "point_coords": (*points, 2), "point_labels": points}
        outputs = {"low_res_masks": ("prompts", 1, SIDE, SIDE), "iou_predictions": ("prompts", 1)}
        parts = (
            Part("image_encoder", self.encoder, {"image": (1, 3, SIZE, SIZE)}, {"image_embeddings": embedding}, image),
            Part("mask_decoder", self.decoder, decoder_inputs, outputs, prompts, masks=("low_res_masks",)),
        )
        facts = {
            "preprocessing": self._preprocessing(),
            "prompts": {"box": True, "points": True, "labels": LABELS},
            "model": {"family": "small", "name": "small"},
            "intended_use": "Tests.",
        }
        return Exported("segmenter", parts, {"prompts": (1, 8), "points": (2, 6)}, facts)

    def _preprocessing(self):
        minmax, corner = self.normalisation == "min_max", self.fit == "corner"
        return {
            "kind": "sam",
            "size": SIZE,
            "resize": "longest_side" if corner else "square",
            "filter": "nearest" if self.fit == "stretch_nearest" else "bilinear",
            "antialias": self.fit != "stretch_nearest",
            "value_range": "minmax" if minmax else "0-255",
            "mean": [0.0, 0.0, 0.0] if minmax else list(PIXEL_MEAN),
            "std": [1.0, 1.0, 1.0] if minmax else list(PIXEL_STD),
            "pad": "bottom_right" if corner else "none",
            "pad_value": 0.0,
            "mask_threshold": 0.0,
        }


def overlap(ours, theirs):
    """IoU of two masks; 1 where both are empty."""
    either = np.logical_or(ours, theirs).sum()
    return np.logical_and(ours, theirs).sum() / either if either else 1.0
