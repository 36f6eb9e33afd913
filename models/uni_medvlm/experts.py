"""MedPLIB's mixture of experts (arXiv:2412.09278, section 3.3): in a language model's layers, SwiGLU experts in the FFN's place.

    y = sum over the chosen e of w_e(x) down_e(silu(gate_e x) * up_e x)

The experts begin as copies of the layer's FFN, or are given, one unlike the other: whole, or frozen with a LoRA of their own, as
MedPLIB trains them. `kernels/moe_routing.py` says how tokens are routed, `kernels/moe_dispatch.py` what runs; the layers of a model
share a ledger, through which padding comes in and the losses come out.

Letters: B rows, T tokens, S = B T, H width, E experts, K experts a token, F width of an FFN.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn

from kernels.moe_dispatch import moe_mlp
from kernels.moe_router import MOST_CHOICES, MOST_EXPERTS, route
from models.uni_medvlm.ledger import RoutingLedger
from models.uni_medvlm.projections import PROJECTIONS, expert_projections, expert_sizes

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
class RoutingOptions:
    """`capacity_factor` None: nothing is dropped; else an expert takes ceil(capacity_factor K S / E) tokens, or `min_capacity`.

    S counts padding, as DeepSpeed's does, though padding takes no expert's room. `drop`: who has to go, the latest ("position")
    or the least likely ("probs"). `renormalize`: a token's weights have the sum 1, as a pretrained FFN in each expert needs; with
    K = 1 the router then learns from the auxiliary losses alone.
    """

    top_k: int = 2
    capacity_factor: float | None = None
    min_capacity: int = 0
    drop: str = "position"
    renormalize: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MOST_CHOICES:
            raise ValueError(f"top_k must be 1 to {MOST_CHOICES}, not {self.top_k}")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor must be positive or None, not {self.capacity_factor}")
        if self.drop not in ("position", "probs"):
            raise ValueError(f"drop must be 'position' or 'probs', not {self.drop!r}")


@dataclass(frozen=True)
class ExpertLoRA:
    """LoRA on an expert's three projections; MedPLIB's values."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05


class MixtureOfExperts(nn.Module):
    """[B, T, H] -> [B, T, H] through E experts as `projections.py` knows them. `layer` is this layer's number in the ledger.

    With a capacity tokens are dropped in training only: an answer's tokens, which come one by one, would meet another capacity
    than their prompt's. Experts run together: their own `forward`, and hooks on them, are not called. Raises
    ValueError for experts that are not of this width, and where there are fewer than two or than a token needs.
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
        _check(experts, hidden_size, self.options)
        self.ledger = ledger or RoutingLedger()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Parameter(torch.empty(len(experts), hidden_size, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.router, a=5**0.5)  # nn.Linear's, as DeepSpeed's router has it

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, _ = hidden.shape
        tokens, options = hidden.flatten(0, 1), self.options
        routing = route(
            tokens,
            self.router,
            options.top_k,
            mask=self.ledger.token_mask(rows, length),
            renormalize=options.renormalize,
            capacity_factor=options.capacity_factor if self.training else None,
            min_capacity=options.min_capacity,
            priority="probability" if options.drop == "probs" else None,
        )
        self.ledger.record(self.layer, routing)
        return moe_mlp(tokens, routing, *expert_projections(self.experts)).view_as(hidden)


def add_experts(
    decoder: nn.Module,
    num_experts: int,
    options: RoutingOptions | None = None,
    *,
    layers: Sequence[int] | None = None,
    lora: ExpertLoRA | None = None,
) -> RoutingLedger:
    """As `put_experts`, with `num_experts` copies of its own FFN in each of the `layers` (None: all)."""
    blocks: Any = decoder.layers
    chosen = sorted(set(range(len(blocks)) if layers is None else layers))
    _check_layers(blocks, chosen)
    each = {number: [copy.deepcopy(blocks[number].mlp) for _ in range(num_experts)] for number in chosen}
    return put_experts(decoder, each, options, lora=lora)


def put_experts(
    decoder: nn.Module,
    experts: Mapping[int, Sequence[nn.Module]],
    options: RoutingOptions | None = None,
    *,
    lora: ExpertLoRA | None = None,
) -> RoutingLedger:
    """Put the given experts, by the layer's number, in the place of `mlp` in the layers of a Hugging Face decoder.

    They are used themselves, not copied: trainable as they are, or with `lora`, in new adapters only. The routers are new,
    trainable and float32.

    The decoder is the module with `layers`, such as `model.get_decoder()`. From each call it takes a two-dimensional attention_mask
    as the real tokens. Returns the ledger of all its layers. Raises ValueError, and changes nothing, for layers that are not there
    or have experts already, for experts that are not FFNs of the layer's width, and where there are fewer than a token needs.
    """
    blocks: Any = decoder.layers
    ledger, options = RoutingLedger(), options or RoutingOptions()
    _check_layers(blocks, experts)
    widths = {number: expert_sizes(blocks[number].mlp)[0] for number in experts}
    for number, given in experts.items():
        _check(given, widths[number], options)
    for number in sorted(experts):
        mlp, given = blocks[number].mlp, experts[number]
        with mlp.down_proj.weight.device:
            adapted = [expert if lora is None else _with_adapters(expert, lora) for expert in given]
            blocks[number].mlp = MixtureOfExperts(adapted, widths[number], options, ledger, number).train(mlp.training)
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


def _check_layers(blocks: Any, numbers: Iterable[int]) -> None:
    for number in numbers:
        if not 0 <= number < len(blocks) or isinstance(blocks[number].mlp, MixtureOfExperts):
            raise ValueError(f"layer {number} can have no experts: it has some, or is none of the {len(blocks)} layers")


def _check(experts: Sequence[nn.Module], hidden_size: int, options: RoutingOptions) -> None:
    if len(experts) < options.top_k:
        raise ValueError(f"top_k is {options.top_k}, and there are {len(experts)} experts")
    if not 2 <= len(experts) <= MOST_EXPERTS:
        raise ValueError(f"a mixture has 2 to {MOST_EXPERTS} experts, not {len(experts)}")
    sizes = {expert_sizes(expert) for expert in experts}
    if len(sizes) > 1 or next(iter(sizes))[0] != hidden_size:
        raise ValueError(f"experts must be of width {hidden_size} and one inner width, not {sorted(sizes)}")


def _with_adapters(expert: nn.Module, lora: ExpertLoRA) -> nn.Module:
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(PROJECTIONS))
    adapted = inject_adapter_in_model(config, expert)  # which freezes all but the adapters
    cast_adapter_dtype(adapted, "default")  # to float32, where the model is in a half type
    return adapted
