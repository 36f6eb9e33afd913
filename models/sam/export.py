"""A SAM as two networks to be exported: an image encoder, run once an image, and a mask decoder, run for its prompts.

    image [1, 3, S, S] -> image_embeddings [1, C, h, w]
    image_embeddings, point_coords [P, T, 2], point_labels [P, T] -> low_res_masks [P, M, 4h, 4w], iou_predictions [P, M]

A prompt is a row of T >= 2 labelled points in pixels of the S x S input, as SAM's own ONNX export has them: its points (1 inside,
0 outside), then either the corners of its box (2 top left, 3 bottom right) or one point of label -1 that stands for no box. So
a box alone, points alone and both are one network, exactly as `PromptEncoder` reads them. The prompts of one call have one T.

Shape letters: P prompts, T points of a prompt, M masks (1), S input size, C embedding channels, h w embedding size.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.exported import Exported, Part, Run, Source
from models.sam.mask_decoder import MaskDecoder
from models.sam.prompt_encoder import PromptEncoder
from models.sam.sam import PIXEL_MEAN, PIXEL_STD, Sam

MOST_PROMPTS, MOST_POINTS = 32, 16
LABELS = {"outside": 0, "inside": 1, "box_top_left": 2, "box_bottom_right": 3, "no_box": -1}
NO_BOX = -1.0


class ImageEmbeddings(nn.Module):
    """The image encoder, whose embedding then lies in memory as its shape says: a package is given it as it is."""

    def __init__(self, image_encoder: nn.Module):
        super().__init__()
        self.image_encoder = image_encoder

    def forward(self, image: Tensor) -> Tensor:
        """[1, 3, S, S] -> [1, C, h, w]."""
        return self.image_encoder(image).contiguous()


class PromptedMasks(nn.Module):
    """Prompt encoder and mask decoder of one image, one mask a prompt."""

    def __init__(self, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = prompt_encoder, mask_decoder

    def forward(self, image_embeddings: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        """See the module's docstring."""
        encoder = self.prompt_encoder
        prompts = point_coords.shape[0]
        sparse = encoder.labelled_points(point_coords, point_labels)
        # A set of image tokens a prompt from the start: the number of prompts then decides nothing, and one graph takes any.
        dense = encoder.no_mask_embed.weight.view(1, 1, -1, 1, 1).expand(1, prompts, -1, *encoder.embedding_size)
        masks, iou = self.mask_decoder(image_embeddings, encoder.dense_pe(), sparse[None], dense, multimask_output=False)
        return masks[0], iou[0]


def export_sam(model: Sam, family: str, source: Source) -> Exported:
    """The parts of a model of the family, a key of BUILDERS, in eval mode; `source` is where its weights come from."""
    drawing = _Drawing(model)
    size, (h, w) = model.image_size, model.prompt_encoder.embedding_size
    channels = model.prompt_encoder.no_mask_embed.embedding_dim
    embedding, points = (1, channels, h, w), ("prompts", "points")
    encoder = Part(
        "image_encoder",
        ImageEmbeddings(model.image_encoder).eval(),
        {"image": (1, 3, size, size)},
        {"image_embeddings": embedding},
        drawing.image,
    )
    decoder = Part(
        "mask_decoder",
        PromptedMasks(model.prompt_encoder, model.mask_decoder).eval(),
        {"image_embeddings": embedding, "point_coords": (*points, 2), "point_labels": points},
        {"low_res_masks": ("prompts", 1, 4 * h, 4 * w), "iou_predictions": ("prompts", 1)},
        drawing.prompts,
        masks=("low_res_masks",),
    )
    facts = {
        "preprocessing": preprocessing(model),
        "prompts": {"box": True, "points": True, "labels": LABELS},
        **source.facts(family),
    }
    dimensions = {"prompts": (1, MOST_PROMPTS), "points": (2, MOST_POINTS)}
    return Exported("segmenter", (encoder, decoder), dimensions, facts, compare=drawing.compare)


def preprocessing(model: Sam) -> dict[str, Any]:
    """What `models.sam.frame` and `Sam.normalise` do, in words and numbers.

    An image is resized by Pillow's filter, which averages where it makes smaller (antialias), on whole numbers; minmax takes the
    least and the largest value of what was resized, all channels together; zeros are then added at the bottom and the right.
    """
    minmax, stretched = model.normalisation == "min_max", model.fit.startswith("stretch")
    nearest = model.fit == "stretch_nearest"
    return {
        "kind": "sam",
        "size": model.image_size,
        "resize": "square" if stretched else "longest_side",
        "filter": "nearest" if nearest else "bilinear",
        "antialias": not nearest,
        "value_range": "minmax" if minmax else "0-255",
        "mean": [0.0, 0.0, 0.0] if minmax else list(PIXEL_MEAN),
        "std": [1.0, 1.0, 1.0] if minmax else list(PIXEL_STD),
        "pad": "none" if stretched else "bottom_right",
        "pad_value": 0.0,
        "mask_threshold": 0.0,
    }


def blobs(size: int, generator: torch.Generator) -> Tensor:
    """[3, size, size] whole numbers in 0-255: soft blobs with a little noise."""
    soft = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator), (size, size), mode="bicubic")[0]
    noise = torch.rand(3, size, size, generator=generator)
    return (255 * (0.95 * soft + 0.05 * noise)).round().clamp(0, 255)


class _Drawing:
    """Seeded images with something to segment in them, their embeddings, and prompts that lie in them."""

    def __init__(self, model: Sam):
        self.model = model
        self.embeddings: dict[int, Tensor] = {}  # by seed: an encoder may take half a minute

    def image(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        return {"image": self._pixels(generator)}

    def prompts(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        P, T = sizes["prompts"], sizes["points"]
        size = self.model.image_size
        points = torch.rand(P, T, 2, generator=generator) * size
        low = points[:, -2:].amin(1)
        corners = torch.stack([low, (low + size / 8 + points[:, -2:].amax(1)).clamp(max=size)], dim=1)
        labels = torch.randint(0, 2, (P, T), generator=generator).float()
        # Every other prompt has a box; a single one has.
        boxed = (torch.arange(P) % 2 == 0)[:, None]
        labels[:, -2:] = torch.where(boxed, torch.tensor([2.0, 3.0]), torch.stack([labels[:, -2], torch.full((P,), NO_BOX)], 1))
        points[:, -2:] = torch.where(boxed[:, :, None], corners, points[:, -2:])
        return {"image_embeddings": self._embedding(generator.initial_seed() % 2), "point_coords": points, "point_labels": labels}

    def compare(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Embedding and masks of a new image, each part reading what the one before it returned, against the model itself."""
        generator = torch.Generator().manual_seed(11)
        given = self.prompts({"prompts": 4, "points": 2}, generator)
        image = self._pixels(generator).to(self._weight.device)
        points, labels = (given[name].to(self._weight.device) for name in ("point_coords", "point_labels"))
        with torch.no_grad():
            boxes = points[::2].flatten(1)  # every other prompt is a box alone
            eager, _ = self.model(image, multimask_output=False, boxes=boxes[None])
            (embedding,) = runs["image_encoder"]({"image": image})
            exported = runs["mask_decoder"](
                {"image_embeddings": embedding, "point_coords": points[::2], "point_labels": labels[::2]}
            )[0]
        both, either = ((eager[0] > 0) & (exported > 0)).sum().item(), ((eager[0] > 0) | (exported > 0)).sum().item()
        iou = both / either if either else 1.0
        if not iou >= 0.995:
            raise ValueError(f"the masks of encoder and decoder together have an IoU of {iou:.4f} with eager's (expected 0.995)")
        return {"whole_mask_iou": iou}

    @property
    def _weight(self) -> Tensor:
        return self.model.prompt_encoder.no_mask_embed.weight

    def _pixels(self, generator: torch.Generator) -> Tensor:
        """[1, 3, S, S], normalised."""
        return self.model.normalise(blobs(self.model.image_size, generator))[None].to(self._weight.dtype)

    @torch.no_grad()
    def _embedding(self, seed: int) -> Tensor:
        if seed not in self.embeddings:
            pixels = self._pixels(torch.Generator().manual_seed(100 + seed)).to(self._weight.device)
            self.embeddings[seed] = self.model.image_encoder(pixels).cpu()
        return self.embeddings[seed]
