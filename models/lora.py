"""LoRA (arXiv:2106.09685) through PEFT, on the language model of any Hugging Face vision-language model.

Adapters are new, or come from a PEFT folder: adapter_config.json and adapter_model.safetensors. PEFT only warns of keys that do not
fit, and leaves the layers untrained; here each has to fit.
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from models.checkpoint import ADAPTER, CheckpointError, check_keys, read_json, read_state_dict, reading

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
HIGHEST_RANK = 4096
PREFIX = "base_model.model."  # of every key of an adapter
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Settings that import a module by name, or make of the model what its forward here does not compute.
UNSUPPORTED = ("megatron_config", "alora_invocation_tokens", "layer_replication", "trainable_token_indices", "target_parameters")
# Which layers are adapted is read from the weights: a pattern may take for ever to match, and old ones name layers otherwise.
SELECTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")


def in_language_model(names: tuple[str, ...]) -> str:
    """PEFT's pattern for the layers of these names in the language model: a vision tower has layers of the same names."""
    return rf".*language_model\..*\.({'|'.join(names)})"


# ---- new adapters ---------------------------------------------------------------------------------------------------


def add_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str | list[str] | None = None,
    frozen: str | None = None,
    float32: bool = True,
) -> PeftModel:
    """`model` with everything frozen but new adapters, which start without effect; its layers are changed in place.

    `target_modules`: a pattern, or what `layers_to_adapt` takes; None: LINEARS of the language model. Layers beneath the module
    `frozen` get none. With `float32` adapters are in float32 whatever the model is in.
    """
    if isinstance(target_modules, list):
        target_modules = layers_to_adapt(model, target_modules, frozen)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or in_language_model(LINEARS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=float32)


def layers_to_adapt(model: nn.Module, names: Collection[str], frozen: str | None = None) -> list[str]:
    """The layers of `model` whose names end in one of `names`; ALL_LINEAR stands for every linear one but the head, and a lone name
    that no layer ends in is a pattern for whole names, as in PEFT. None of the layers beneath the module `frozen`.

    Raises ValueError for a name that names nothing, for the head, and for embeddings that are the head's weights.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    head = _head(model)
    free = [name for name in layers if frozen is None or not name.startswith(f"{frozen}.")]
    chosen: set[str] = set()
    for name in names:
        if name == ALL_LINEAR:
            found = [layer for layer in free if isinstance(layers[layer], nn.Linear) and layers[layer] is not head]
        else:
            found = [layer for layer in free if layer == name or layer.endswith(f".{name}")]
        if not found and len(names) == 1:
            found = [layer for layer in free if _pattern(name).fullmatch(layer)]
        if not found:
            ends = sorted({layer.rpartition(".")[2] for layer in free if not layer.rpartition(".")[2].isdigit()})
            raise ValueError(f"--lora_target_modules {name}: no layer is called so; there are {ALL_LINEAR}, {', '.join(ends)}")
        for layer in found:
            if head is not None and layers[layer].weight is head.weight:
                raise ValueError(
                    f"--lora_target_modules {name}: {layer} is the head, or shares its weights: it can have no adapters"
                )
        chosen.update(found)
    return sorted(chosen)


def _head(model: Any) -> Any:
    """The layer that makes logits, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"--lora_target_modules {text}: not a pattern ({error})") from None


# ---- adapters of a folder -------------------------------------------------------------------------------------------


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says; CheckpointError where it is not LoRA, or not LoRA that can be used here."""
    file = folder / ADAPTER
    config = read_json(file)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {str(kind)[:20]!r}: expected LORA")
    for name in UNSUPPORTED:
        if config.get(name):
            raise CheckpointError(f"{file}: {name} is not supported")
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) and all(map(_is_quick, pattern)) for pattern in patterns):
        raise CheckpointError(f"{file}: rank_pattern and alpha_pattern: expected numbers by names of layers")
    for rank in (config.get("r"), *patterns[0].values()):
        if not (type(rank) is int and 1 <= rank <= HIGHEST_RANK):
            raise CheckpointError(f"{file}: a rank (r, rank_pattern) is {str(rank)[:20]!r}: expected 1 to {HIGHEST_RANK}")
    for alpha in (config.get("lora_alpha"), *patterns[1].values()):
        if type(alpha) not in (int, float):
            raise CheckpointError(f"{file}: lora_alpha is {str(alpha)[:20]!r}: expected a number")
    return config


def _is_quick(pattern: str) -> bool:
    """Whether it is a name, or a pattern without nested repetition, which cannot take for ever."""
    return re.fullmatch(r"[\w.^$\\*-]+", pattern) is not None and pattern.count("*") <= 3


def read_adapters(
    model: nn.Module,
    folder: Path,
    *,
    trainable: bool = False,
    rename: Callable[[str, Path], str] = lambda key, file: key,
    float32: bool = True,
) -> PeftModel:
    """The bare `model` with the adapters of `folder`, frozen or to be trained further; its layers are changed in place.

    `rename(key, file)`: what the model calls a key of the file. CheckpointError where a key is missing or unexpected.
    """
    settings, file = read_adapter_config(folder), adapter_weights(folder)
    state = renamed(read_state_dict(file), rename, file)
    names = {key.removeprefix(PREFIX).split(".lora_")[0] for key in state if ".lora_" in key}
    there = {name for name, _ in model.named_modules()}
    if not names or not names <= there:
        strange = ", ".join(sorted(names - there)[:2])[:120] or "no layer"
        raise CheckpointError(f"{file}: not adapters of this model: they adapt {strange}, missing in it")
    head = _head(model)
    for name in names:
        if head is not None and getattr(model.get_submodule(name), "weight", None) is head.weight:
            raise CheckpointError(
                f"{file}: adapts {name}, which has the head's weights: not supported, since losses read those alone"
            )
    with reading(folder / ADAPTER):
        given = {key: value for key, value in settings.items() if key not in (*SELECTIONS, "auto_mapping")}
        config: Any = LoraConfig.from_peft_type(**given | {"target_modules": sorted(names), "inference_mode": not trainable})
        adapted = get_peft_model(model, config, autocast_adapter_dtype=float32)
    put_weights(adapted, state, file)
    return adapted.eval()


def adapter_weights(folder: Path) -> Path:
    """The file of an adapter folder that holds its weights, or should."""
    return next((folder / name for name in WEIGHTS if (folder / name).exists()), folder / WEIGHTS[0])


def renamed(state: dict[str, Tensor], rename: Callable[[str, Path], str], file: Path) -> dict[str, Tensor]:
    """The state dict of an adapter under the keys that the model has."""
    return {PREFIX + rename(key.removeprefix(PREFIX), file) if key.startswith(PREFIX) else key: state[key] for key in state}


def put_weights(model: PeftModel, state: dict[str, Tensor], file: Path) -> None:
    """These weights, read from `file`, into the adapters that `model` has; CheckpointError where one is missing or unexpected."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if any("embed" in key for key in state.keys() - expected.keys()):  # PEFT saves embeddings where they have adapters
        expected = get_peft_model_state_dict(model, save_embedding_layers=True)
    check_keys(expected, state, f"{file}: not adapters of this model")
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{file}: {broken[0]} is not finite")
    with reading(file):
        set_peft_model_state_dict(model, state)


def beneath_adapters(model: nn.Module) -> Any:
    """The Hugging Face model that PEFT has wrapped, or `model` itself. Its layers carry the adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_effect(model: PeftModel) -> bool:
    """Whether its adapters change what it computes: new ones, whose second matrices are zero, do not."""
    parts = (".lora_B.", ".lora_embedding_B.", ".modules_to_save.")
    second = [parameter for name, parameter in model.named_parameters() if any(part in name for part in parts)]
    return not second or any(bool(parameter.any()) for parameter in second)
