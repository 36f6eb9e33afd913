"""What an op makes beside its output, counted."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The most elements of a tensor that anything but a view makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x, returned in zip(out if isinstance(out, tuple) else (out,), function._schema.returns, strict=False):
            if isinstance(x, torch.Tensor) and returned.alias_info is None:
                self.elements = max(self.elements, x.numel())
        return out
