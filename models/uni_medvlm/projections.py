"""The three projections of SwiGLU experts as the kernels take them: their weights, and those of the LoRA that PEFT put around them.

An expert has bias-free linear layers gate_proj, up_proj and down_proj, plain ones or PEFT's, and SiLU between them: Hugging Face's
FFN of Llama, Mistral and Qwen. The weights are read where they lie, at each forward, so that adapters may be put in, switched off,
exchanged or merged at any time.

Letters: H width, F width of an FFN, r rank.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from kernels.moe_dispatch import ExpertLinear

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_sizes(expert: nn.Module) -> tuple[int, int]:
    """(H, F) of an expert; ValueError where it is none that the kernels can run."""
    shapes: list[tuple[int, int]] = []
    for name in PROJECTIONS:
        layer = getattr(expert, name, None)
        base = layer.base_layer if isinstance(layer, LoraLinear) else layer
        if not isinstance(base, nn.Linear) or base.bias is not None:
            raise ValueError(f"an expert's {name} must be a linear layer without bias, plain or with PEFT's LoRA, not {layer}")
        shapes.append((base.in_features, base.out_features))
    (hidden, inner), up, down = shapes
    if up != (hidden, inner) or down != (inner, hidden):
        raise ValueError(f"an expert's gate_proj, up_proj and down_proj must be H to F, H to F and F to H, not {shapes}")
    act, x = getattr(expert, "act_fn", F.silu), torch.linspace(-4, 4, 9, device="cpu")
    if not torch.allclose(act(x), F.silu(x), atol=1e-6):
        raise ValueError(f"an expert's activation must be SiLU, not {act}")
    return hidden, inner


def expert_projections(experts: Sequence[nn.Module] | nn.ModuleList) -> list[ExpertLinear]:
    """gate_proj, up_proj and down_proj of all experts. ValueError where their adapters are not of one kind."""
    return [_projection([getattr(expert, name) for expert in experts]) for name in PROJECTIONS]


def _projection(layers: list[Any]) -> ExpertLinear:
    adapters = [_adapter(layer) for layer in layers]
    weights = [getattr(layer, "base_layer", layer).weight for layer in layers]
    if not any(adapters):
        return ExpertLinear(weights)
    kinds = {adapter and (adapter[0].shape[0], adapter[2], adapter[3]) for adapter in adapters}
    if len(kinds) > 1:
        raise ValueError(f"experts must have adapters of one rank, scale and dropout, not {kinds}")
    lora_A, lora_B, scales, dropouts = zip(*(adapter for adapter in adapters if adapter), strict=True)
    return ExpertLinear(weights, lora_A, lora_B, scales[0], dropouts[0])


def _adapter(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float, float] | None:
    """lora_A (r, in), lora_B (out, r), scale and the dropout of now; None where there is none, or it is off or merged."""
    if not isinstance(layer, LoraLinear):
        return None
    layer = cast(Any, layer)  # PEFT's dictionaries are of modules that mypy knows nothing of
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return None
    names = [] if layer.merged else [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) > 1 or any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in names):
        raise ValueError(f"an expert can have one plain LoRA at a time, not {names}")
    if not names:
        return None
    [name] = names
    first, second, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return first.weight, second.weight, layer.scaling[name], share
