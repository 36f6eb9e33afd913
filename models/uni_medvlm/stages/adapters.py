"""Adapters around the attention of a language model whose FFNs are experts, which have adapters of their own: stage 5's."""

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

from models.lora import ATTENTION
from models.uni_medvlm.experts import ExpertLoRA


def adapt_attention(llm: nn.Module, lora: ExpertLoRA) -> None:
    """New adapters around the attention's projections of a language model whose FFNs may be experts with adapters of their own.

    Where there are some already, as when stage 5 goes on, these stay.
    """
    decoder: Any = llm.get_decoder()  # type: ignore[operator]
    for layer in decoder.layers:
        if hasattr(layer.self_attn.q_proj, "lora_A"):
            continue
        config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(ATTENTION))
        adapted = inject_adapter_in_model(config, layer.self_attn)
        cast_adapter_dtype(adapted, "default")
        adapted.train(layer.training)
