"""What a target's exporter gives back, and the manifest's entries for it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import safetensors
import torch

from engine.export.part import Exportable, Part, Run, Shape, example_sizes

VESALIUS = "0.1.0"  # setup.py's version


class Packages(NamedTuple):
    """The exported parts: the manifest's `packages`, what runs each of them, and further entries of the manifest."""

    entries: Mapping[str, dict[str, Any]]
    runs: Mapping[str, Run]
    facts: Mapping[str, Any]


def versions(**others: str) -> dict[str, str]:
    """Of what made a bundle; torch's without that of its build."""
    return {"vesalius": VESALIUS, "torch": torch.__version__.split("+")[0], "safetensors": safetensors.__version__, **others}


def type_name(dtype: torch.dtype) -> str:
    """As a manifest writes it: float32."""
    return str(dtype).removeprefix("torch.")


def described(part: Part, model: Exportable, outputs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The manifest's `inputs` and `outputs` of a part; `outputs` are their types, in order."""
    sample = part.sample(example_sizes(model.dimensions), torch.Generator().manual_seed(0))
    inputs = [_entry(name, shape, type_name(sample[name].dtype)) for name, shape in part.inputs.items()]
    types = zip(part.outputs.items(), outputs, strict=True)
    return {"inputs": inputs, "outputs": [_entry(name, shape, dtype) for (name, shape), dtype in types]}


def weight_type(part: Part) -> torch.dtype:
    """Of a part's first weight."""
    return next(part.module.parameters()).dtype


def _entry(name: str, shape: Shape, dtype: str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}
