"""What the exporters ask of a model: its parts, and what is true of the whole. `models/exported.py` implements it unknowingly.

A shape is a tuple of numbers and names; a name is a dimension whose range the model gives: (1, 256, 64, 64), ("prompts", 2).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim

SEED = 20261127  # of the inputs that are traced
Shape = tuple[int | str, ...]
Ranges = Mapping[str, tuple[int, int]]  # a dimension's name -> its smallest and largest size
Run = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]  # a part as it was exported: inputs by name -> its outputs in order


class Part(Protocol):
    """One network, exported as one package."""

    @property
    def name(self) -> str:
        """The package's, e.g. image_encoder."""

    @property
    def module(self) -> nn.Module:
        """In eval mode; takes the inputs in order, returns a tensor or a tuple of them."""

    @property
    def inputs(self) -> Mapping[str, Shape]:
        """Their names and shapes, in order."""

    @property
    def outputs(self) -> Mapping[str, Shape]:
        """Their names and shapes, in order."""

    @property
    def masks(self) -> Sequence[str]:
        """The outputs whose sign is a mask: half types must keep it."""

    def sample(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Inputs such as the network meets in use, on the CPU and in the module's type, with dimensions of these sizes."""


class Exportable(Protocol):
    """A model whose parts become a bundle."""

    @property
    def kind(self) -> str:
        """segmenter, vlm."""

    @property
    def parts(self) -> Sequence[Part]:
        """In the order in which they run."""

    @property
    def dimensions(self) -> Ranges:
        """The range of each name that stands in a shape."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Entries of the manifest: preprocessing, model, intended_use, and what else the kind has."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Further files of the bundle, such as a tokenizer, by name."""

    def check(self, runs: Mapping[str, Run]) -> Mapping[str, Any]:
        """The exported parts run one after another compared with the whole model: entries of the manifest's `parity`.

        ValueError, one line, where they differ.
        """


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a module returned, as a tuple of tensors."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def example_sizes(ranges: Ranges) -> dict[str, int]:
    """A size of each dimension to trace with: neither 0 nor 1, which torch.export takes for constants, and no two the same."""
    sizes: dict[str, int] = {}
    for name, (low, high) in ranges.items():
        size = max(2, low)
        while size in sizes.values() and size < high:
            size += 1
        sizes[name] = size
    return sizes


def dimensions_of(part: Part, ranges: Ranges) -> dict[str, tuple[int, int]]:
    """The ranges of those dimensions that the part's inputs have."""
    used = {entry for shape in part.inputs.values() for entry in shape if isinstance(entry, str)}
    return {name: limits for name, limits in ranges.items() if name in used}


def example(part: Part, ranges: Ranges) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace a part with, in order, and of each the axes that have a range, as torch.export takes them.

    They are contiguous, and what is compiled takes its inputs for such, whatever layout a sample has.
    """
    used = dimensions_of(part, ranges)
    named = {name: Dim(name, min=low, max=high) for name, (low, high) in used.items()}
    sample = part.sample(example_sizes(used), torch.Generator().manual_seed(SEED))
    shapes = tuple(
        {axis: named[entry] for axis, entry in enumerate(shape) if isinstance(entry, str)} for shape in part.inputs.values()
    )
    return tuple(sample[name].contiguous() for name in part.inputs), shapes
