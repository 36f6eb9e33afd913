"""LoRA (arXiv:2106.09685) on a policy, through PEFT: adapters on the language model, the vision tower left alone by default."""

import torch
from peft import LoraConfig, get_peft_model

from models.qwen.policy import QwenVLPolicy

LANGUAGE_LINEARS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def add_lora(policy: QwenVLPolicy, *, r: int, alpha: int, dropout: float, target_modules: list[str] | None = None) -> QwenVLPolicy:
    """The same policy with trainable adapters in float32 and everything else frozen. `target_modules`: names, or None as above."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules or LANGUAGE_LINEARS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(policy.base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return QwenVLPolicy(model, policy.processor)
