"""PRS-Med's way from an image and the language model's states to a mask, as two networks to be exported.

    image [1, 3, S, S] -> image_embeddings [1, C, h, w]
    image_embeddings, prompt_states [1, tokens, H] -> mask_logits [1, 1, S, S]

The states are the language model's last ones of the prompt, image tokens included (`PRSMed.prefill`), in the mask decoder's type.
The language model itself is not part of the bundle.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.exported import Exported, Part, Run, Source
from models.prs_med.model import ENCODERS, PRSMed
from models.sam.export import ImageEmbeddings, blobs
from models.sam.sam import PIXEL_MEAN, PIXEL_STD, normalised

TOKENS = (2, 1024)  # states of a prompt: LLaVA's image has 576


def export_prs_med(model: PRSMed, source: Source) -> Exported:
    """Encoder and mask decoder of a model in eval mode."""
    kind, hidden = ENCODERS[model.config.image_encoder], model.base.config.get_text_config().hidden_size
    size, side = kind.image_size, kind.image_size // kind.stride
    embedding, states = (1, kind.channels, side, side), (1, "tokens", hidden)
    encoder, decoder = ImageEmbeddings(model.image_encoder).eval(), model.mask_decoder
    weight = next(decoder.parameters())

    def image(sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        return {"image": normalised(blobs(size, generator), "imagenet")[None].to(weight.dtype)}

    @torch.no_grad()
    def prompt(sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        seen = encoder(image(sizes, generator)["image"].to(weight.device)).cpu()
        drawn = torch.randn(1, sizes["tokens"], hidden, generator=generator).to(weight.dtype)
        return {"image_embeddings": seen, "prompt_states": drawn}

    @torch.no_grad()
    def compare(runs: Mapping[str, Run]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(11)
        given = {**image({}, generator), **prompt({"tokens": 7}, generator)}
        pixels, drawn = given["image"].to(weight.device), given["prompt_states"].to(weight.device)
        eager = decoder(model.image_encoder(pixels), drawn) > 0
        (seen,) = runs["image_encoder"]({"image": pixels})
        exported = runs["mask_decoder"]({"image_embeddings": seen, "prompt_states": drawn})[0].to(eager.device) > 0
        agreement = (eager == exported).float().mean().item()
        if not agreement >= 0.995:
            raise ValueError(
                f"encoder and mask decoder together agree with eager on {agreement:.4f} of the pixels (expected 0.995)"
            )
        return {"whole_pixel_agreement": agreement}

    parts = (
        Part("image_encoder", encoder, {"image": (1, 3, size, size)}, {"image_embeddings": embedding}, image),
        Part(
            "mask_decoder",
            decoder,
            {"image_embeddings": embedding, "prompt_states": states},
            {"mask_logits": (1, 1, size, size)},
            prompt,
            masks=("mask_logits",),
        ),
    )
    facts = {
        "preprocessing": {
            "kind": "sam",
            "size": size,
            "resize": "square",
            "filter": "bilinear",
            "antialias": True,
            "value_range": "0-255",
            "mean": list(PIXEL_MEAN),
            "std": list(PIXEL_STD),
            "pad": "none",
            "pad_value": 0.0,
            "mask_threshold": 0.0,
        },
        "prompts": {"box": False, "points": False, "states": {"size": hidden, "of": model.config.vlm}},
        **source.facts("prs_med"),
    }
    return Exported("segmenter", parts, {"tokens": TOKENS}, facts, compare=compare)
