"""A policy from a checkpoint folder of `models.uni_medvlm.checkpoints.saving`, its published networks from where they lie."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel, GenerationConfig

from kernels.moe_router import MOST_EXPERTS
from models.checkpoint import CheckpointError, read_json, reading, refuse_folder_of
from models.lora import HIGHEST_RANK, read_adapters
from models.pretrained import check_numbers, without_foreign
from models.tokenizer import check_vocabulary, load_tokenizer
from models.uni_medvlm.checkpoints.networks import (
    SAMS,
    assembled,
    causal_lm,
    checked_decoder,
    load_convnext,
    load_language_model,
    load_visual_model,
    load_vit,
)
from models.uni_medvlm.checkpoints.saving import SETTINGS, Origin, load_trained
from models.uni_medvlm.experts import ExpertLoRA, RoutingOptions, add_experts
from models.uni_medvlm.model import PROJECTORS, UniMedConfig
from models.uni_medvlm.policy import UniMedPolicy
from models.uni_medvlm.stages.adapters import adapt_attention
from models.uni_medvlm.tokens import NEW_TOKENS

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMMAND = "python -m recipes.unimed_stage4_router"
ELSEWHERE = ("llm", "vision_tower", "convnext", "sam_ckpt")


def load_pretrained(folder: str | Path, *, dtype: torch.dtype | None = None) -> UniMedPolicy:
    """A trained policy in eval mode, everything frozen.

    `dtype` is that of the language model (None: as it was saved).
    Raises CheckpointError or OSError, in one line, for a checkpoint that is not there or cannot be used.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        refuse_folder_of(folder, SETTINGS)
        raise FileNotFoundError(f"{folder}: no Uni-MedVLM checkpoint there (expected {SETTINGS}; make one with: {COMMAND})")
    settings = read_settings(folder / SETTINGS)
    origin = settings["origin"]
    language_model = _language_model(settings, folder, dtype or settings["dtype"])
    towers = _tower(settings, folder, "vision_tower"), _tower(settings, folder, "convnext")
    visual_model = SAMS[origin.sam]()
    if origin.sam_ckpt is not None:
        visual_model = _from(origin.sam_ckpt, "sam_ckpt", folder, lambda path: load_visual_model(origin.sam, path))
    experts, ledger = settings["experts"], None
    if experts is not None:
        with reading(folder / SETTINGS):
            lora = ExpertLoRA(**experts["lora"]) if experts["lora"] else None
            options = RoutingOptions(**experts["options"])
            decoder = language_model.get_decoder()
            ledger = add_experts(decoder, experts["num_experts"], options, layers=experts["layers"], lora=lora)
    if settings["attention"] is not None:
        with reading(folder / SETTINGS):
            adapt_attention(language_model, ExpertLoRA(**settings["attention"]))
    tokenizer = load_tokenizer(folder)
    with reading(folder / SETTINGS):
        check_vocabulary(tokenizer, settings["start"] + len(NEW_TOKENS), folder)
    policy = assembled(
        folder / SETTINGS,
        language_model,
        tokenizer,
        towers,
        visual_model,
        settings["config"],
        origin,
        settings["fused_after"],
        settings["select_layer"],
        settings["start"],
    )
    model = policy.model
    model.ledger = ledger
    if settings["adapters"]:
        model.language_model = read_adapters(model.language_model, folder)
    model.requires_grad_(False)
    load_trained(model, folder)
    model.eval()
    return policy


def read_settings(file: Path) -> dict[str, Any]:
    """What unimed.json says, as the classes that it is of; CheckpointError for a setting that is missing, unknown or impossible."""
    with reading(file):  # a list where a word was expected, and the like
        return _checked(read_json(file), file)


def _checked(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    names = "origin config start fused_after select_layer dtype networks experts attention adapters generation".split()
    missing, unknown = [name for name in names if name not in settings], [name for name in settings if name not in names]
    if missing or unknown:
        wrong = f"lacks {missing[0]}" if missing else f"unknown setting {unknown[0][:40]!r}"
        raise CheckpointError(f"{file}: {wrong} (there are {', '.join(names)})")
    check_numbers({name: value for name, value in settings.items() if name != "generation"}, file)
    origin, config = _fields(settings, "origin", Origin, file), _fields(settings, "config", UniMedConfig, file)
    texts = [getattr(origin, name) for name in (*ELSEWHERE, "merged")]
    if not all(text is None or (isinstance(text, str) and text.strip()) for text in texts) or origin.sam not in SAMS:
        raise CheckpointError(f"{file}: origin: expected folders, files or null, and a sam of {', '.join(SAMS)}")
    if config.projector not in PROJECTORS or config.compat not in ("default", "reference"):
        raise CheckpointError(
            f"{file}: config: projector {str(config.projector)[:20]!r} or compat {str(config.compat)[:20]!r} is unknown"
        )
    if settings["dtype"] not in TYPES:
        raise CheckpointError(f"{file}: dtype is {str(settings['dtype'])[:20]!r}: expected {', '.join(TYPES)}")
    for name in ("llm", "vision_tower", "convnext"):
        if getattr(origin, name) is None and not isinstance((settings["networks"] or {}).get(name), dict):
            raise CheckpointError(f"{file}: networks lacks {name}, which lies nowhere else")
    for kind, most in (("experts", MOST_EXPERTS), ("attention", HIGHEST_RANK)):
        _check_sizes(settings[kind], most, f"{file}: {kind}")
    return settings | {"origin": origin, "config": config, "dtype": TYPES[settings["dtype"]]}


def _check_sizes(settings: Any, most: int, what: str) -> None:
    """Raise CheckpointError where a number of experts, or a LoRA's rank, is none that can be: it would fill all memory."""
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise CheckpointError(f"{what}: expected an object or null")
    lora = settings.get("lora") if "lora" in settings else settings
    numbers = {"num_experts": (settings, most), "r": (lora, HIGHEST_RANK)}
    for name, (place, largest) in numbers.items():
        if isinstance(place, dict) and name in place and not (type(place[name]) is int and 1 <= place[name] <= largest):
            raise CheckpointError(f"{what}: {name} is {str(place[name])[:20]!r}: expected 1 to {largest}")


def _fields(settings: dict[str, Any], name: str, kind: Any, file: Path) -> Any:
    values, known = settings[name], [field.name for field in fields(kind)]
    if not isinstance(values, dict) or not set(values) <= {*known}:
        raise CheckpointError(f"{file}: {name}: expected an object of {', '.join(known)}")
    return kind(**values)


def _from(path: str, name: str, folder: Path, load: Any) -> Any:
    """A published network, from where unimed.json says it lies."""
    try:
        return load(path)
    except (OSError, CheckpointError) as error:
        kind = OSError if isinstance(error, OSError) else CheckpointError
        raise kind(f"{error}; {folder / SETTINGS} says that its {name} lies there") from None


def _language_model(settings: dict[str, Any], folder: Path, dtype: torch.dtype) -> Any:
    origin = settings["origin"]
    if origin.llm is not None:
        return _from(origin.llm, "llm", folder, lambda path: load_language_model(path, dtype))[0]
    config, model_class = causal_lm(without_foreign(settings["networks"]["llm"]), folder / SETTINGS)
    with reading(folder / SETTINGS):
        model = model_class(copy.deepcopy(config)).to(dtype)
        model.generation_config = GenerationConfig.from_dict(settings["generation"] or {})
    return checked_decoder(model, folder / SETTINGS)


def _tower(settings: dict[str, Any], folder: Path, name: str) -> Any:
    path = getattr(settings["origin"], name)
    if path is not None:
        return _from(path, name, folder, load_vit if name == "vision_tower" else load_convnext)
    kinds: dict[str, tuple[Any, Any]] = {
        "vision_tower": (CLIPVisionConfig, CLIPVisionModel),
        "convnext": (ConvNextConfig, ConvNextModel),
    }
    config_class, model_class = kinds[name]
    with reading(folder / SETTINGS):
        return model_class(config_class.from_dict(without_foreign(settings["networks"][name])))
