"""A policy as it was: the trained parameters of a module as they are now, which can take their places again for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class StartingPoint:
    """Copies of the parameters of `model` that are trained; all others stay the same and are not copied."""

    def __init__(self, model: nn.Module):
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._first = [parameter.detach().clone() for parameter in self._trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module computes with the copies."""
        self._first = [first.to(own) for first, own in zip(self._first, self._trained, strict=True)]  # moved once, with the model
        present = [parameter.data for parameter in self._trained]
        self._put(self._first)
        try:
            yield
        finally:
            self._put(present)

    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._trained, values, strict=True):
            parameter.data = value
        torch.clear_autocast_cache()  # it knows parameters, not what they hold
