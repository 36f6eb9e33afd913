"""The published networks that a Uni-MedVLM is made of, each from its own folder or file, and the model that they make together.

language model   a folder or hub name of any Hugging Face causal LM of Llama's kind, with its tokenizer
ViT              the same of CLIP: CLIPVisionModel, or a whole CLIPModel
ConvNeXt         the same of ConvNextModel or ConvNextForImageClassification, or a file of torchvision's (convnext_large-*.pth)
SAM              a checkpoint file: sam-med2d_b.pth
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from models.checkpoint import CheckpointError, check_keys, find_folder, read_state_dict, reading
from models.pretrained import load_config, load_model, read_config
from models.sam.loading import load_sam
from models.sam.sam import BUILDERS, Sam
from models.starter.encoder import starter_sam
from models.tokenizer import check_vocabulary, load_tokenizer
from models.uni_medvlm.checkpoints.saving import Origin
from models.uni_medvlm.encoder.hybrid_encoder import FUSED_AFTER, HybridEncoder
from models.uni_medvlm.encoder.loading import NOT_OURS, present_key
from models.uni_medvlm.experts import expert_sizes
from models.uni_medvlm.model import UniMedConfig, UniMedVLM
from models.uni_medvlm.policy import UniMedPolicy
from models.uni_medvlm.processor import Sizes, UniMedProcessor

SAMS = BUILDERS | {"starter": starter_sam}
CONVNEXT_FILES = (".pth", ".pt", ".bin", ".safetensors")  # torchvision's are files, Hugging Face's folders
STAGES_AT = (1, 3, 5, 7)  # of torchvision's `features`


def build_unimed(
    llm: str | Path,
    vision_tower: str | Path,
    convnext: str | Path,
    sam_ckpt: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    fused_after: Sequence[int] = FUSED_AFTER,
    sam: str = "sam_med2d",
    **settings: Any,
) -> UniMedPolicy:
    """A model to be trained from stage 1 on, in eval mode: published networks, and new ones between them.

    `dtype` is that of the language model; all else is float32, as what is trained must be. `sam`: a key of SAMS;
    `settings`: UniMedConfig's.
    Raises CheckpointError or OSError, in one line, for a checkpoint that cannot be used.
    """
    config = UniMedConfig(**settings)
    language_model, tokenizer = load_language_model(llm, dtype)
    origin = Origin(_named(llm), _named(vision_tower), _named(convnext), _named(sam_ckpt), sam)
    towers = load_vit(vision_tower), load_convnext(convnext)
    visual_model, what = load_visual_model(sam, sam_ckpt), f"{llm} with {vision_tower}"
    return assembled(what, language_model, tokenizer, towers, visual_model, config, origin, fused_after)


def assembled(
    what: str | Path,
    language_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    towers: tuple[CLIPVisionModel, ConvNextModel],
    sam: Sam,
    config: UniMedConfig,
    origin: Origin,
    fused_after: Sequence[int],
    select_layer: int = -2,
    start: int | None = None,
) -> UniMedPolicy:
    """The networks as one policy in eval mode, all but the new parts as they came. `start`: the first new token's id, if known.

    CheckpointError, which begins with `what`, where they do not go together.
    """
    with reading(what):
        encoder = HybridEncoder(
            *towers, fused_after=fused_after, select_layer=select_layer, tiling=config.tiling, compat=config.compat
        )
    start = len(tokenizer) if start is None else start
    processor = UniMedProcessor(tokenizer, Sizes.of(encoder, sam), config.tiling, config.compat)
    with reading(what):
        taken = next((token for place, token in enumerate(processor.ids) if processor.ids[token] != start + place), None)
    if taken is not None:
        raise CheckpointError(f"{what}: the tokenizer has a token {taken} of its own: it must be one that is added")
    with reading(what):
        model = UniMedVLM(encoder, language_model, sam, start, config)
    model.origin = origin
    model.eval()
    return UniMedPolicy(model, processor)


def _named(path: str | Path) -> str:
    """How a checkpoint names a folder or file, so that it is found from anywhere; a hub name stays."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


# ---- language model --------------------------------------------------------------------------------------------------


def load_language_model(path: str | Path, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal LM with FFNs of Llama's kind, and its tokenizer."""
    folder = find_folder(path)
    settings = read_config(folder)
    config, model_class = causal_lm(settings, folder)
    tokenizer = load_tokenizer(folder, config)
    check_vocabulary(tokenizer, config.vocab_size, folder)
    return checked_decoder(load_model(model_class, folder, config, dtype=dtype), folder), tokenizer


def causal_lm(settings: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """(config, class) of the causal LM that config.json describes; CheckpointError where it is none that can be used."""
    kind = settings.get("model_type")
    config_class: Any = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{folder}: no causal language model (model_type {str(kind)[:40]!r})")
    config = load_config(config_class, settings, folder)
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise CheckpointError(f"{folder}: sliding-window attention is not supported")
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]


def checked_decoder(model: Any, folder: Path) -> Any:
    """The model, if its decoder has layers with FFNs that can be experts; else CheckpointError."""
    layers = getattr(model.get_decoder(), "layers", None)
    try:
        expert_sizes(layers[0].mlp)  # type: ignore[index]
    except (AttributeError, TypeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{folder}: its layers are not of Llama's kind ({reason})") from None
    return model


# ---- towers and SAM --------------------------------------------------------------------------------------------------


def load_vit(path: str | Path) -> CLIPVisionModel:
    """CLIP's vision model from its own folder, or from that of a whole CLIP, float32."""
    folder = find_folder(path)
    settings = read_config(folder)
    whole = settings["model_type"] == "clip"
    if whole:
        settings = settings.get("vision_config") or {}
    elif settings["model_type"] != "clip_vision_model":
        raise CheckpointError(f"{path}: no CLIP (model_type {settings['model_type'][:40]!r})")
    config = load_config(CLIPVisionConfig, settings, folder)
    return load_model(CLIPVisionModel, folder, config, dtype=torch.float32, only_part=whole)


def load_convnext(path: str | Path) -> ConvNextModel:
    """A ConvNeXt from its own folder, from that of an image classifier, or from torchvision's file, float32."""
    file = Path(path)
    if file.suffix in CONVNEXT_FILES and not file.is_dir():
        return _from_torchvision(file)
    folder = find_folder(path)
    settings = read_config(folder)
    if settings["model_type"] != "convnext":
        raise CheckpointError(f"{path}: no ConvNeXt (model_type {settings['model_type'][:40]!r})")
    return load_model(ConvNextModel, folder, load_config(ConvNextConfig, settings, folder), dtype=torch.float32, only_part=True)


def _from_torchvision(file: Path) -> ConvNextModel:
    """Its sizes are read from its tensors."""
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file (expected a ConvNeXt of torchvision, or a folder of one)")
    state = read_state_dict(file)
    depths, widths = [], []
    for place in STAGES_AT:
        blocks = {int(found[1]) for key in state if (found := re.match(rf"features\.{place}\.(\d{{1,3}})\.", key))}
        first = state.get(f"features.{place}.0.block.0.weight")
        if not blocks or first is None or first.ndim != 4 or not first.shape[0]:
            raise CheckpointError(f"{file}: no ConvNeXt of torchvision (expected features.{place}.0.block.0.weight)")
        depths.append(len(blocks))
        widths.append(first.shape[0])
    model = ConvNextModel(ConvNextConfig(hidden_sizes=widths, depths=depths))
    model.register_module("layernorm", nn.Identity())  # of its pooled output, which torchvision has in its classifier
    prefix = "convnext_encoder."
    present: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not NOT_OURS.search(f"{prefix}{key}"):
            present[present_key(f"{prefix}{key}").removeprefix(prefix)] = (
                tensor.flatten() if key.endswith(".layer_scale") else tensor
            )
    check_keys(model.state_dict(), present, f"{file}: not a ConvNeXt of torchvision")
    model.load_state_dict(present)
    return model.eval()


def load_visual_model(name: str, file: str | Path) -> Sam:
    """A SAM whose mask decoder answers `<SEG>`; `name`: a key of SAMS."""
    if name not in SAMS:
        raise CheckpointError(f"no SAM is called {str(name)[:40]!r}; there are {', '.join(SAMS)}")
    if name in BUILDERS:
        return load_sam(name, file)
    sam, state = starter_sam(), read_state_dict(file)
    check_keys(sam.state_dict(), state, f"{file}: not a checkpoint of {name}")
    sam.load_state_dict(state)
    return sam.eval()
