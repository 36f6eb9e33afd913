"""One way to get a policy: a checkpoint folder, a hub name or the starter policy; a whole model, or an adapter of one.

An adapter is a PEFT folder: adapter_config.json, adapter_model.safetensors, and from our own runs tokenizer and image processor. It
names its base model, which is read as any checkpoint is.
"""

import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from models.checkpoint import ADAPTER, MODEL, CheckpointError, find_folder, local_folder, reading
from models.lora import add_lora, read_adapter_config, read_adapters
from models.pretrained import read_config
from models.qwen.policy import QwenVLPolicy, load_qwen_vl
from models.qwen.processor import PIXEL_FILES

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STARTER_POLICY = Path(__file__).parent / "starter" / "policy"
SKIN_STARTER_POLICY = Path(__file__).parent / "starter" / "skin_policy"
TOWER = "model.visual"
LONGEST_NAME = 250  # characters of a file's name that any system has
# Layers as older versions of transformers called them, and what they are called: adapters were trained with both.
FORMER_NAMES = {r"^model\.layers\.": "model.language_model.layers.", r"^visual\.": "model.visual."}
logger = logging.getLogger(__name__)


def load_policy(
    path: str | None,
    *,
    starter: Path = STARTER_POLICY,
    dtype: torch.dtype = torch.float32,
    freeze_vision: bool = False,
    lora: dict[str, Any] | None = None,
    merge_adapter: bool = False,
    base_model: str | None = None,
    revision: str = "main",
    **options: Any,
) -> QwenVLPolicy:
    """Load `path` (None: the starter policy, `starter`).

    `lora` holds the arguments of `add_lora`. With it an adapter is trained further, and keeps its own settings. Without it an
    adapter is applied and frozen, or with `merge_adapter` merged into its base, all of whose weights can then be trained.
    `base_model`: where an adapter's base is, if not where the adapter says. `options` are those of `load_qwen_vl`.

    Raises CheckpointError for a checkpoint that cannot be used, OSError where there is none.
    """
    path = str(path or starter)
    folder = find_folder(path, revision)
    if not is_adapter(folder):
        if base_model is not None:
            raise CheckpointError(f"{path}: a whole model; only an adapter has a base (--base_model_name_or_path)")
        policy = load_qwen_vl(path, dtype=dtype, revision=revision, **options)
        _refuse_quantized(policy, path, merge_adapter)
        _freeze(policy, freeze_vision)
        if lora is None:
            return policy
        return _adapted(policy, add_lora(policy.base, frozen=TOWER if freeze_vision else None, **lora), path, revision)

    base, base_revision = find_base(folder, base_model)
    own = any((folder / name).exists() for name in PIXEL_FILES)
    policy = load_qwen_vl(base, dtype=dtype, revision=base_revision, processor=folder if own else None, **options)
    _refuse_quantized(policy, base, merge_adapter)
    adapted = read_adapters(policy.base, folder, trainable=lora is not None, rename=_present_name)
    if lora is not None:
        config: Any = adapted.peft_config["default"]
        logger.info("training the adapter of %s further (r %d, alpha %s), on %s", path, config.r, config.lora_alpha, base)
    elif merge_adapter:
        with reading(folder):  # not every kind of LoRA can be merged
            merged: Any = adapted.merge_and_unload(safe_merge=True)
        merged.requires_grad_(True)
        policy = QwenVLPolicy(merged, policy.processor)
        _freeze(policy, freeze_vision)
        return policy
    _freeze(policy, freeze_vision)
    return _adapted(policy, adapted, base, base_revision)


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds an adapter and no model."""
    return (folder / ADAPTER).is_file() and not (folder / MODEL).is_file()


def find_base(folder: Path, base_model: str | None = None) -> tuple[str, str]:
    """(folder or hub name, revision) of the model that an adapter belongs to: `base_model`, or else what adapter_config.json names,
    as it stands there or as a folder beside the adapter's. CheckpointError, which says how to name it, where it is none of these.
    """
    settings = read_adapter_config(folder)
    named, revision = base_model or settings.get("base_model_name_or_path"), "main"
    if base_model is None and isinstance(settings.get("revision"), str):
        revision = settings["revision"]
    if not isinstance(named, str) or not named.strip():
        raise CheckpointError(f"{folder / ADAPTER}: names no base model: name it with --base_model_name_or_path")
    if len(named) > LONGEST_NAME or "\0" in named:
        raise CheckpointError(f"{folder / ADAPTER}: base_model_name_or_path {named[:40]!r}: expected a folder or a hub name")
    last = re.split(r"[/\\]", named.rstrip("/\\"))[-1]
    beside = [folder / named, folder.parent / last] if base_model is None and last not in ("", ".", "..") else []
    found = next((place for place in (Path(named), *beside) if (place / MODEL).is_file()), None)
    if found is not None:
        return os.path.abspath(found), revision
    if any((place / ADAPTER).is_file() for place in (Path(named), *beside)):
        raise CheckpointError(
            f"{named}: the base of {folder} is itself an adapter: merge it first (python -m recipes.merge_adapter)"
        )
    if not Path(named).is_absolute() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", named):
        try:
            find_folder(named, revision)
        except OSError as error:
            raise CheckpointError(f"{error}; it is the base model of {folder}: name it with --base_model_name_or_path") from None
        return named, revision
    raise CheckpointError(f"{folder}: its base model {named[:160]!r} is not there: name it with --base_model_name_or_path")


def _present_name(key: str, file: Path) -> str:
    for former, present in FORMER_NAMES.items():
        key = re.sub(former, present, key)
    return key


def _refuse_quantized(policy: QwenVLPolicy, path: str, whole: bool) -> None:
    if whole and getattr(policy.base, "is_quantized", False):
        raise CheckpointError(f"{path}: quantized weights can be neither trained nor merged into (--use_peft trains adapters)")


def _freeze(policy: QwenVLPolicy, freeze_vision: bool) -> None:
    if freeze_vision:
        policy.base.model.visual.requires_grad_(False)


def _adapted(policy: QwenVLPolicy, model: PeftModel, base: str, revision: str) -> QwenVLPolicy:
    """The policy with its adapters, whose checkpoints will say what they belong to, wherever they are loaded from."""
    folder, config = local_folder(base), model.peft_config["default"]
    config.base_model_name_or_path = base if folder is None else os.path.abspath(folder)
    config.revision = None if folder is not None else revision
    return QwenVLPolicy(model, policy.processor)


def write_merged(path: str, output: Path, base_model: str | None = None) -> dict[str, str]:
    """Write the adapter `path` merged into its base model as a Hugging Face folder, whole or not at all; what was made of what.

    Merged in float32, and written in the base's own type. Raises CheckpointError for an adapter that cannot be used, OSError where
    `output` cannot be written or holds something already.
    """
    folder = find_folder(path)
    if not is_adapter(folder):
        raise CheckpointError(f"{path}: a whole model, not an adapter (expected adapter_config.json and no config.json)")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: exists already")
    base, revision = find_base(folder, base_model)
    named = read_config(find_folder(base, revision))
    dtype = next((TYPES[name] for name in (named.get("dtype"), named.get("torch_dtype")) if name in TYPES), torch.float32)
    policy = load_policy(path, merge_adapter=True, base_model=base_model)
    policy.base.to(dtype)  # type: ignore[arg-type]  # transformers hides the type of `to`
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as staging:
        whole = Path(staging) / "whole"
        policy.base.save_pretrained(whole)
        policy.processor.save_pretrained(whole)
        output.mkdir(exist_ok=True)
        output.rmdir()  # where it was there, empty
        os.rename(whole, output)
    return {"adapter": path, "base": base, "dtype": str(dtype).removeprefix("torch."), "output": str(output)}
