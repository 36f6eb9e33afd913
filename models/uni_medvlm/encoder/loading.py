"""Published tensors into the hybrid encoder: CLIP under Hugging Face's former names, torchvision's ConvNeXt, the CVFMs.

A file may hold all three parts, or some of them: the published stage 1 saves the CVFMs beside a projector, which is left out.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.checkpoint import CheckpointError, check_keys
from models.uni_medvlm.encoder.hybrid_encoder import HybridEncoder

PARTS = ("vision_tower.", "convnext_encoder.", "cvfm_modules.")
AROUND = r"^(?:module\.|base_model\.model\.)*(?:model\.)?(?:vision_tower\.(?=vision_tower\.|convnext_encoder\.|cvfm_modules\.))?"
NOT_OURS = re.compile(r"(^|\.)mm_projector\.|^convnext_encoder\.classifier\.|\.position_ids$")
# torchvision's blocks are sequences: their places, and what Hugging Face calls them.
BLOCK = {
    "block.0": "dwconv",
    "block.2": "layernorm",
    "block.3": "pwconv1",
    "block.5": "pwconv2",
    "layer_scale": "layer_scale_parameter",
}
STEM = {"0": "patch_embeddings", "1": "layernorm"}


def load_published(encoder: HybridEncoder, state: Mapping[str, Tensor], what: str | Path) -> None:
    """Put into `encoder` the parts that `state`, read from `what`, holds; each of them must be whole, and fit.

    Raises CheckpointError where a key is missing, unexpected or of another shape, or where there is none of the parts.
    """
    present = {}
    for key, tensor in state.items():
        inner = re.sub(AROUND, "", key)
        if not NOT_OURS.search(inner):
            present[present_key(inner)] = tensor.flatten() if inner.endswith(".layer_scale") else tensor
    held = tuple(part for part in PARTS if any(key.startswith(part) for key in present))
    if not held:
        raise CheckpointError(f"{what}: holds no part of a hybrid encoder (expected keys with {', '.join(PARTS)})")
    published = any(module.published for module in encoder.cvfm_modules)  # type: ignore[union-attr]
    normalised = any(re.match(r"cvfm_modules\.\d+\.norm\.", key) for key in present)
    if "cvfm_modules." in held and published != normalised:
        has, fitting = ("has", "reference") if normalised else ("lacks", "default")
        raise CheckpointError(f"{what}: its CVFM {has} a LayerNorm: the encoder must be made with compat={fitting!r}")
    expected = {key: tensor for key, tensor in encoder.state_dict().items() if key.startswith(held)}
    check_keys(expected, present, f"{what}: not parts of this hybrid encoder")
    encoder.load_state_dict(present, strict=False)  # strict within the parts, by check_keys


def present_key(key: str) -> str:
    """A published key, without what is around the encoder, as the encoder has it."""
    if key.startswith("vision_tower."):
        return re.sub(r"^vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower.", key)
    features = re.match(r"convnext_encoder\.features\.(\d+)\.(\d+)\.(.+)$", key)
    if features is None:
        return key
    place, inner, rest = int(features[1]), features[2], features[3]
    if place == 0:
        return f"convnext_encoder.embeddings.{STEM.get(inner, inner)}.{rest}"
    stage = f"convnext_encoder.encoder.stages.{place // 2}"  # at 1, 3, 5, 7 its blocks, at 2, 4, 6 what leads to it
    if place % 2 == 0:
        return f"{stage}.downsampling_layer.{inner}.{rest}"
    name, dot, leaf = rest.rpartition(".") if rest != "layer_scale" else (rest, "", "")
    return f"{stage}.layers.{inner}.{BLOCK.get(name, name)}{dot}{leaf}"
