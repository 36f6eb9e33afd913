"""What the mixture-of-experts layers of one model share: which tokens are real, and how each layer routed them.

It is the auxiliary losses' way out of a Hugging Face model, whose layers hand on nothing but hidden states:

    outputs = model(input_ids, attention_mask=...)
    loss = outputs.loss + ledger.auxiliary_loss(balance=0.01)

The ledger knows the last forward only. Where layers are checkpointed, that must be without reentry (the losses have no gradient
otherwise), and a forward's backward comes before the next forward, since the layers run again with the tokens known then.

Letters: B rows, T tokens of a row, L layers with experts, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.moe_routing import Routing


class RoutingLedger:
    """`real_tokens` [B, T] bool, set before a forward, says which are real where its attention_mask has not two dimensions."""

    def __init__(self) -> None:
        self.real_tokens: Tensor | None = None
        self.routings: dict[int, Routing] = {}  # by the layer's number
        self._mask: Tensor | None = None
        self._counts: dict[int, Tensor] = {}
        self._dropped: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingLedger":
        return RoutingLedger()  # a copied model has its own, empty: tensors with a history cannot be copied

    def begin(self, attention_mask: Tensor | None = None) -> None:
        """A forward begins, with `real_tokens` or else this mask, [B, >= T]: its last T columns are the tokens of the forward."""
        mask = self.real_tokens if self.real_tokens is not None else attention_mask
        self._mask, self.real_tokens = None if mask is None else mask.bool(), None
        self.routings = {}

    def token_mask(self, rows: int, length: int) -> Tensor | None:
        """[B * T] bool of the forward's tokens, None where all are real; ValueError where the mask is of other tokens."""
        if self._mask is None:
            return None
        if self._mask.ndim != 2 or self._mask.shape[0] != rows or self._mask.shape[1] < length:
            raise ValueError(f"the mask of real tokens is {tuple(self._mask.shape)}, and the tokens are {(rows, length)}")
        return self._mask[:, self._mask.shape[1] - length :].flatten()

    def record(self, layer: int, routing: Routing) -> None:
        """The first time in a forward; when a checkpointed layer runs again, it is known."""
        if layer in self.routings:
            return
        self.routings[layer] = routing
        dropped = routing.counts.sum() - (routing.slots >= 0).sum()
        self._counts[layer] = self._counts.get(layer, 0) + routing.counts.long()
        self._dropped[layer] = self._dropped.get(layer, 0) + dropped

    def auxiliary_loss(self, balance: float = 0.01, z: float = 0.0) -> Tensor:
        """The last forward's losses, times their coefficients, added over layers as MedPLIB and MoE-LLaVA do: a scalar.

        Raises ValueError where nothing has been routed since the last `begin`.
        """
        if not self.routings:
            raise ValueError("no layer with experts has run: there is no auxiliary loss")
        return torch.stack([balance * routing.balance_loss + z * routing.z_loss for routing in self.routings.values()]).sum()

    def counts(self) -> Tensor:
        """[L, E] int64: the tokens that chose each expert since `reset_usage`, in the layers' order; processes may add theirs."""
        return torch.stack([self._counts[layer] for layer in sorted(self._counts)])

    def usage(self) -> Tensor:
        """[L, E]: each expert's share of its layer's counts. Rows have the sum 1."""
        counts = self.counts()
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)

    def dropped(self) -> Tensor:
        """[L]: the share of choices that found their expert full, since `reset_usage`."""
        dropped = torch.stack([self._dropped[layer] for layer in sorted(self._dropped)])
        return dropped / self.counts().sum(-1).clamp(min=1)

    def reset_usage(self) -> None:
        """Count from here, as before each task of an evaluation."""
        self._counts, self._dropped = {}, {}
