"""Hugging Face's classes from a checkpoint folder: config and model, with none of the folder's code and nothing left out.

`from_pretrained` gives weights that a checkpoint lacks random values and only warns, asks at the terminal whether to run a folder's
Python, and follows settings to other files. Here a config is made from what was read and checked, and every key has to fit.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from models.checkpoint import ADAPTER, MODEL, CheckpointError, read_json, reading, refuse_keys, weight_files

# What would run code, or lead to other files or kernels than those of the folder. Nothing of it describes a model.
FOREIGN = frozenset(
    "auto_map configuration_files transformers_weights attn_implementation _attn_implementation _attn_implementation_internal "
    "experts_implementation name_or_path _name_or_path".split()
)
# The largest value that a whole number of a config may have; the smallest is 1. A layer too many is an hour, or all memory.
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 1 << 12),
    **dict.fromkeys(("hidden_size", "out_hidden_size", "embed_dim", "head_dim", "projection_dim"), 1 << 17),
    **dict.fromkeys(("intermediate_size", "image_seq_length"), 1 << 20),
    **dict.fromkeys(("image_size", "patch_size", "window_size"), 1 << 14),
    **dict.fromkeys(("spatial_merge_size", "temporal_patch_size", "num_channels", "in_channels", "in_chans"), 1 << 6),
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
GENERATION = "generation_config.json"
PACKAGES = {"bitsandbytes": "bitsandbytes"}  # quantization methods that can be loaded, and what each needs


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says of a whole model, its numbers in bounds, without what would lead elsewhere.

    Raises CheckpointError for a folder that holds an adapter beside it, since then it is unclear which of the two is meant.
    """
    config = without_foreign(read_json(folder / MODEL))
    if (folder / ADAPTER).exists():
        raise CheckpointError(f"{folder}: holds config.json and adapter_config.json: expected a model or an adapter")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder / MODEL}: lacks model_type, or has one that is no text")
    check_numbers(config, folder / MODEL)
    for part in (config, *config.values()):
        _check_quantization(part.get("quantization_config") if isinstance(part, dict) else None, folder / MODEL)
    if (folder / GENERATION).exists():
        read_json(folder / GENERATION)  # a damaged one would be left out without a word, and its end tokens with it
    return config


def without_foreign(value: Any) -> Any:
    """A config without FOREIGN settings, at any depth."""
    if isinstance(value, dict):
        return {key: without_foreign(item) for key, item in value.items() if key not in FOREIGN}
    return [without_foreign(item) for item in value] if isinstance(value, list) else value


def check_numbers(config: dict[str, Any], file: Path, within: str = "") -> None:
    """Raise CheckpointError for a size in the config (nested ones too) that is no whole number, or out of bounds."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_numbers(value, file, f"{within}{key}.")
        elif key in LARGEST and value is not None and not (type(value) is int and 1 <= value <= LARGEST[key]):
            shown = str(value)[:20]
            raise CheckpointError(f"{file}: {within}{key} is {shown!r}: expected a whole number from 1 to {LARGEST[key]}")


def required(config: dict[str, Any], names: str, file: Path) -> dict[str, Any]:
    """These settings of a config; CheckpointError that names one which it lacks."""
    for name in names.split():
        if config.get(name) is None:
            raise CheckpointError(f"{file}: lacks {name}")
    return {name: config[name] for name in names.split()}


def _check_quantization(settings: Any, file: Path) -> None:
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in PACKAGES:
        shown = str(method)[:20]
        raise CheckpointError(
            f"{file}: weights quantized by {shown!r} are not supported: take the checkpoint they were made from, or bitsandbytes'"
        )
    if importlib.util.find_spec(PACKAGES[method]) is None:
        raise CheckpointError(f"{file}: weights quantized by {method} need it (pip install {PACKAGES[method]})")


def load_config(config_class: type[PreTrainedConfig], settings: dict[str, Any], folder: Path) -> Any:
    """The config of a class, from what `read_config` gives."""
    with reading(folder / MODEL):
        return config_class.from_dict(settings)


def four_bits(skipped: list[str]) -> BitsAndBytesConfig:
    """QLoRA's quantization (arXiv:2305.14314) of all linear layers but those beneath `skipped`: NF4, its constants quantized too,
    products in bfloat16. CheckpointError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError("--load_in_4bit needs bitsandbytes, which is not installed (pip install bitsandbytes)")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )


def load_model(
    model_class: Any, folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype, only_part: bool = False, **options: Any
) -> Any:
    """A model in eval mode with the weights of `folder`, each of them there and in its shape.

    `only_part`: the folder may hold more than this model. `options` are `from_pretrained`'s.
    Raises CheckpointError that names a file, or the keys that are missing, unexpected or of another shape.
    """
    weight_files(folder)  # says plainly what is wrong with one
    with reading(folder), _quiet():
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **options,
        )
    shapes = [f"{key} is {list(given)} instead of {list(own)}" for key, given, own in sorted(info["mismatched_keys"])]
    found = {"missing": sorted(info["missing_keys"]), "of another shape": shapes, "damaged": sorted(info["error_msgs"])}
    refuse_keys(found | ({} if only_part else {"unexpected": sorted(info["unexpected_keys"])}), f"{folder}: not its weights")
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's table of keys: those that matter are in the error."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
