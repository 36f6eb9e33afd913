"""A model as its exporters see it, as `engine/export/part.py` asks: parts with named inputs, and what is true of the whole.

A shape's entry is a number, or the name of a dimension whose range `Exported.dimensions` has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int | str, ...]
Run = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]  # an exported part: inputs by name -> its outputs in order


@dataclass(frozen=True)
class Part:
    """One network: `module` takes the inputs in order and returns the outputs in order; `masks` are those whose sign is a mask.

    `draw` makes inputs such as it meets in use, on the CPU, for sizes of the dimensions and a seeded generator.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    draw: Callable[[Mapping[str, int], torch.Generator], dict[str, Tensor]]
    masks: Sequence[str] = ()

    def sample(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """`draw`, as a method."""
        return self.draw(sizes, generator)


@dataclass(frozen=True)
class Source:
    """Where a model comes from and what for: its name, the SHA-256 of its weights, an intended use in words; and that of
    the rows that it was trained on, where it is known."""

    name: str
    sha256: str
    intended_use: str
    training_data_sha256: str | None = None

    def facts(self, family: str) -> dict[str, Any]:
        """The manifest's `model` and `intended_use`."""
        model = {"family": family, "name": self.name, "sha256": self.sha256}
        return {"model": {**model, "training_data_sha256": self.training_data_sha256}, "intended_use": self.intended_use}


def nothing_more(runs: Mapping[str, Run]) -> dict[str, Any]:
    """The check of a model of which no more is to be said than of its parts."""
    return {}


@dataclass(frozen=True)
class Exported:
    """`parts` in the order in which they run; `facts` are the manifest's entries about the model, `files` go beside it.

    `compare(runs)` runs the exported parts one after another and compares them with the whole model: entries of the manifest's
    `parity`, or ValueError.
    """

    kind: str
    parts: Sequence[Part]
    dimensions: Mapping[str, tuple[int, int]]
    facts: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    compare: Callable[[Mapping[str, Run]], Mapping[str, Any]] = nothing_more

    def check(self, runs: Mapping[str, Run]) -> Mapping[str, Any]:
        """`compare`, as a method."""
        return self.compare(runs)
