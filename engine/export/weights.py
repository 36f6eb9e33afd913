"""The weights of all packages of a bundle: each tensor once, however many packages read it."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class WeightStore:
    """Tensors by the name under which the bundle keeps them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._named: dict[tuple, str] = {}

    def add(self, part: str, constants: Mapping[str, Tensor]) -> dict[str, str]:
        """{the package's name of a constant: the bundle's}; what another package has brought already is not kept twice."""
        names = {}
        for constant, tensor in constants.items():
            same: tuple = (
                tensor.untyped_storage().data_ptr(),
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
            )
            if not tensor.numel():
                same = (part, constant)  # empty tensors all lie at address 0
            if same not in self._named:
                self._named[same] = f"{part}.{constant}"
                self.tensors[f"{part}.{constant}"] = tensor.detach()  # held: nothing else can come to lie there
            names[constant] = self._named[same]
        return names

    def save(self, file: Path) -> None:
        """As safetensors, each with a storage of its own."""
        save_file({name: tensor.cpu().contiguous().clone() for name, tensor in self.tensors.items()}, file)
