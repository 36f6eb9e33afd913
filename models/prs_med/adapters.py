"""PRS-Med's adapters: LoRA on the language model's attention, and read back so that they really are applied.

The published code loads adapters into a model that already has some. PEFT then finds no key that fits and only warns, so the
untrained adapters stay. Here every key must fit, also the keys of adapters saved in LLaVA-Med's original layout.
"""

from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn

from models import lora
from models.checkpoint import read_state_dict
from models.llava.llava_med import module_key
from models.lora import ATTENTION, add_lora, beneath_adapters, in_language_model

ORIGINAL = ("model.layers.", "model.vision_tower.vision_tower.")  # how keys of the original layout begin


def add_adapters(vlm: nn.Module, *, r: int, alpha: int, dropout: float, compat: str = "default") -> PeftModel:
    """`vlm` with everything frozen but new adapters on the language model's attention; `compat`: see `models.prs_med`."""
    published = compat == "reference"
    targets = list(ATTENTION) if published else in_language_model(ATTENTION)
    model = add_lora(vlm, r=r, alpha=alpha, dropout=dropout, target_modules=targets, float32=not published)
    beneath_adapters(model).model.vision_tower.requires_grad_(False)  # it has adapters where `published`; they never learn
    return model


def read_adapters(vlm: nn.Module, folder: Path) -> PeftModel:
    """The bare `vlm` with the adapters of `folder`, for inference; CheckpointError where they are not there, or do not fit."""
    return lora.read_adapters(vlm, folder, rename=_present_name)


def load_adapters(model: PeftModel, folder: Path) -> None:
    """The weights of `folder` into the adapters that `model` has; CheckpointError where a key is missing or unexpected."""
    file = lora.adapter_weights(folder)
    lora.put_weights(model, lora.renamed(read_state_dict(file), _present_name, file), file)


def _present_name(key: str, file: Path) -> str:
    return module_key(key, file) if key.startswith(ORIGINAL) else key


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model that carries adapters, as it was before it got them."""
    return {key.replace(".base_layer.", "."): tensor for key, tensor in state.items() if ".lora_" not in key}
