"""LoRA on PRS-Med's language model, through PEFT (arXiv:2106.09685), and adapters read back so that they really are applied.

The published code loads adapters into a model that already has some; PEFT then finds no key that fits, says so in a warning, and
the untrained adapters stay. Here every key must fit, also those of adapters saved in LLaVA-Med's original layout. It also names
the adapted layers by their endings alone, which the vision tower shares: that has adapters too, which never learn.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from models.llava.llava_med import module_key
from models.sam.loading import CheckpointError, check_keys, read_state_dict

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ATTENTION = rf".*language_model\..*\.({'|'.join(PROJECTIONS)})"
PREFIX = "base_model.model."
ORIGINAL = ("model.layers.", "model.vision_tower.vision_tower.")  # how keys of the original layout begin


def add_adapters(vlm: nn.Module, *, r: int, alpha: int, dropout: float, compat: str = "default") -> PeftModel:
    """`vlm` with everything frozen but new adapters on the language model's attention, in float32.

    `compat="reference"`: as published, in the VLM's own type, and frozen ones on the vision tower as well.
    """
    published = compat == "reference"
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=PROJECTIONS if published else ATTENTION,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(vlm, config, autocast_adapter_dtype=not published)
    model.get_base_model().model.vision_tower.requires_grad_(False)  # the published code computes it without gradients
    return model


def read_adapters(vlm: nn.Module, folder: Path) -> PeftModel:
    """The bare `vlm` with the adapters of `folder`, for inference."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no adapters ({str(error).splitlines()[0]})") from None
    config.inference_mode = True
    model = get_peft_model(vlm, config)
    load_adapters(model, folder)
    return model


def load_adapters(model: PeftModel, folder: Path) -> None:
    """The weights of `folder` into the adapters that `model` has; CheckpointError where a key is missing or unexpected."""
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.is_file()), files[0])
    state = {_module_key(key, file): tensor for key, tensor in read_state_dict(file).items()}
    check_keys(get_peft_model_state_dict(model, save_embedding_layers=False), state, f"{file}: not adapters of this model")
    set_peft_model_state_dict(model, state)


def _module_key(key: str, file: Path) -> str:
    name = key.removeprefix(PREFIX)
    return PREFIX + module_key(name, file) if name.startswith(ORIGINAL) else key


def without_adapters(state: dict[str, Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a model that carries adapters, as it was before it got them."""
    return {key.replace(".base_layer.", "."): tensor for key, tensor in state.items() if ".lora_" not in key}
