"""Numbers that must stay finite: a run stops, in one line, where its loss, its gradient or its weights do not."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.errors import InputError


class FiniteWatch:
    """Notes numbers of steps without waiting for the device; `check` looks at all of them at once."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, str, Tensor]] = []

    def note(self, step: int, name: str, value: Tensor | float | None) -> None:
        """`value` (0-dim) of what `name` says, in `step`."""
        if value is not None:
            self.noted.append((step, name, torch.as_tensor(value).detach()))

    def check(self, advice: str) -> None:
        """InputError, which ends with `advice`, for the first number since the last check that is not finite."""
        noted, self.noted = self.noted, []
        if not noted:
            return
        device = next((value.device for *_, value in noted if value.device.type != "cpu"), torch.device("cpu"))
        values = torch.stack([value.to(device, torch.float32) for *_, value in noted]).tolist()
        for (step, name, _), value in zip(noted, values, strict=True):
            if not math.isfinite(value):
                raise InputError(f"step {step}: the {name} is {value}; {advice}")


def first_not_finite(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The name of the first parameter with a number that is not finite."""
    named = [(name, weight.detach()) for name, weight in parameters if weight.is_floating_point() and weight.itemsize > 1]
    flags = [weight.isfinite().all() for _, weight in named]
    if not flags or all(torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()):
        return None
    return next(name for (name, _), flag in zip(named, flags, strict=True) if not flag)
