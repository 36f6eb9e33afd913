"""One way to get a policy: a checkpoint folder, a hub name or the starter policy, with or without adapters."""

from pathlib import Path

import torch

from models.lora import add_lora
from models.qwen.policy import QwenVLPolicy, load_qwen_vl

STARTER_POLICY = Path(__file__).parent / "starter" / "policy"


def load_policy(
    path: str | None,
    *,
    dtype: torch.dtype = torch.float32,
    freeze_vision: bool = False,
    lora: dict | None = None,
    **options,
) -> QwenVLPolicy:
    """Load `path` (None: the starter policy) to be trained.

    `lora` holds the arguments of `add_lora`, `options` those of `load_qwen_vl`.

    Raises ValueError for a checkpoint of another kind, OSError for one that cannot be read.
    """
    path = str(path or STARTER_POLICY)
    if Path(path).is_absolute() or path.startswith("."):
        if not Path(path, "config.json").is_file():
            raise OSError(f"{path}: no checkpoint there (expected a folder with config.json)")
    try:
        policy = load_qwen_vl(path, dtype=dtype, **options)
    except OSError as error:  # the hub's own words do not always say what was asked of it
        reason = str(error).strip().splitlines()[0]
        raise OSError(reason if path in reason else f"{path}: {reason}") from error
    if freeze_vision:
        policy.base.model.visual.requires_grad_(False)
    return add_lora(policy, **lora) if lora else policy
