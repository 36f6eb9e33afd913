"""One way to get a policy: a checkpoint folder, a hub name or the starter policy, with or without adapters."""

from pathlib import Path
from typing import Any

import torch

from models.checkpoint import local_folder
from models.lora import add_lora
from models.qwen.policy import QwenVLPolicy, load_qwen_vl

STARTER_POLICY = Path(__file__).parent / "starter" / "policy"


def load_policy(
    path: str | None,
    *,
    dtype: torch.dtype = torch.float32,
    freeze_vision: bool = False,
    lora: dict[str, Any] | None = None,
    **options: Any,
) -> QwenVLPolicy:
    """Load `path` (None: the starter policy) to be trained.

    `lora` holds the arguments of `add_lora`, `options` those of `load_qwen_vl`.

    Raises ValueError for a checkpoint of another kind, OSError for one that cannot be read.
    """
    path = str(path or STARTER_POLICY)
    local_folder(path)  # says plainly what a folder lacks
    try:
        policy = load_qwen_vl(path, dtype=dtype, **options)
    except OSError as error:  # the hub's own words do not always say what was asked of it
        reason = str(error).strip().splitlines()[0]
        raise OSError(reason if path in reason else f"{path}: {reason}") from error
    if freeze_vision:
        policy.base.model.visual.requires_grad_(False)
    return QwenVLPolicy(add_lora(policy.base, **lora), policy.processor) if lora else policy
