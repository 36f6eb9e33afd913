"""MedPLIB's mixture of experts (arXiv:2412.09278, section 3.3): in a language model's layers, SwiGLU experts in the FFN's place.

    y = sum over the chosen e of w_e(x) down_e(silu(gate_e x) * up_e x)

Each expert begins as a copy of the layer's FFN: whole, or frozen with a LoRA of its own, as MedPLIB trains them. `routing.py` says
how tokens are routed; the layers of a model share a ledger, through which padding comes in and the losses come out.

Letters: B rows, T tokens, H width, E experts, F width of an FFN.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn

from models.uni_medvlm.ledger import RoutingLedger
from models.uni_medvlm.routing import RoutingOptions, moe_mlp, route

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# DeepSpeed's names, as in MedPLIB's checkpoints, and ours.
PUBLISHED = {r"\bdeepspeed_moe\.gate\.wg\.weight$": "router", r"\bdeepspeed_moe\.experts\.deepspeed_experts\.": "experts."}


class SwiGLU(nn.Module):
    """[..., H] -> [..., H] through F hidden units, under the keys of Hugging Face's Llama."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


@dataclass(frozen=True)
class ExpertLoRA:
    """LoRA on an expert's three projections; MedPLIB's values."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05


class MixtureOfExperts(nn.Module):
    """[B, T, H] -> [B, T, H] through E experts, each [n, H] -> [n, H]. `layer` is this layer's number in the ledger.

    With a capacity tokens are dropped in training only: an answer's tokens, which come one by one, would meet another capacity than
    their prompt's. Raises ValueError where there are fewer experts than a token needs.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        hidden_size: int,
        options: RoutingOptions | None = None,
        ledger: RoutingLedger | None = None,
        layer: int = 0,
    ):
        super().__init__()
        self.options, self.layer = options or RoutingOptions(), layer
        if len(experts) < self.options.top_k:
            raise ValueError(f"top_k is {self.options.top_k}, and there are {len(experts)} experts")
        self.ledger = ledger or RoutingLedger()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Parameter(torch.empty(len(experts), hidden_size, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.router, a=5**0.5)  # nn.Linear's, as DeepSpeed's router has it

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, _ = hidden.shape
        options = self.options if self.training else dataclasses.replace(self.options, capacity_factor=None)
        tokens = hidden.flatten(0, 1)
        routing = route(tokens, self.router, options, self.ledger.token_mask(rows, length))
        self.ledger.record(self.layer, routing)
        return moe_mlp(tokens, routing, self.experts).view_as(hidden)


def add_experts(
    decoder: nn.Module,
    num_experts: int,
    options: RoutingOptions | None = None,
    *,
    layers: Sequence[int] | None = None,
    lora: ExpertLoRA | None = None,
) -> RoutingLedger:
    """Put `num_experts` copies of its FFN in the place of `mlp` in the `layers` (None: all) of a Hugging Face decoder, trainable in
    whole or with `lora`, in their adapters only. The routers are new, trainable and float32.

    The decoder is the module with `layers`, such as `model.get_decoder()`. From each call it takes a two-dimensional attention_mask
    as the real tokens. Returns the ledger of all its layers. Raises ValueError, and changes nothing, for layers that are not there
    or have experts already, and where there are fewer experts than a token needs.
    """
    blocks: Any = decoder.layers
    ledger, options = RoutingLedger(), options or RoutingOptions()
    chosen = sorted(set(range(len(blocks)) if layers is None else layers))
    for number in chosen:
        if not 0 <= number < len(blocks) or isinstance(blocks[number].mlp, MixtureOfExperts):
            raise ValueError(f"layer {number} can have no experts: it has some, or is none of the {len(blocks)} layers")
    for number in chosen:
        mlp = blocks[number].mlp
        weight = mlp.down_proj.weight
        experts = [_copy(mlp, lora) for _ in range(num_experts)]
        with weight.device:
            blocks[number].mlp = MixtureOfExperts(experts, weight.shape[0], options, ledger, number).train(mlp.training)
    decoder.register_forward_pre_hook(_Begins(ledger), with_kwargs=True)
    return ledger


def present_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a DeepSpeed or MedPLIB checkpoint under the keys that the layers here have."""
    renamed = {}
    for key, tensor in state.items():
        for former, present in PUBLISHED.items():
            key = re.sub(former, present, key)
        renamed[key] = tensor
    return renamed


class _Begins:
    """A decoder's forward pre-hook. A copy of the decoder has a copy of it, and so its own ledger."""

    def __init__(self, ledger: RoutingLedger):
        self.ledger = ledger

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.ledger.begin(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)


def _copy(mlp: nn.Module, lora: ExpertLoRA | None) -> nn.Module:
    expert = copy.deepcopy(mlp)
    if lora is None:
        return expert
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(PROJECTIONS))
    adapted = inject_adapter_in_model(config, expert)  # which freezes all but the adapters
    cast_adapter_dtype(adapted, "default")  # to float32, where the model is in a half type
    return adapted
