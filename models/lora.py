"""LoRA (arXiv:2106.09685) through PEFT, on the language model of any Hugging Face vision-language model."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def in_language_model(names: tuple[str, ...]) -> str:
    """PEFT's pattern for the layers of these names in the language model: a vision tower has layers of the same names."""
    return rf".*language_model\..*\.({'|'.join(names)})"


def add_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str | list[str] | None = None,
    float32: bool = True,
) -> PeftModel:
    """`model` with everything frozen but new adapters, which start without effect; its layers are changed in place.

    `target_modules`: a pattern, or how the names of layers end; None: LINEARS of the language model. With `float32` adapters are
    in float32 whatever the model is in.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or in_language_model(LINEARS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=float32)


def beneath_adapters(model: nn.Module) -> Any:
    """The Hugging Face model that PEFT has wrapped, or `model` itself. Its layers carry the adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
