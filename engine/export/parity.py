"""An exported part against the network that it was made of, on inputs that neither has seen.

float32: the largest difference of any element is at most 1e-4. Half types, whose roundings come in another order: the difference's
norm is at most 2e-2 of the output's, and masks of both have an IoU of at least 0.995.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from engine.errors import InputError
from engine.export.part import Part, Ranges, Run, as_tuple, dimensions_of

TOLERANCE, HALF_TOLERANCE, HALF_IOU = 1e-4, 2e-2, 0.995
FIRST_SEED = 1  # of the inputs; tracing has another


@dataclass
class Parity:
    """What was measured over all outputs of all inputs."""

    max_abs_error: float = 0.0
    relative_error: float = 0.0
    mask_iou: float = 1.0
    inputs: int = 0

    def worst_of(self, other: "Parity") -> "Parity":
        """The larger errors of both, and their inputs together."""
        return Parity(
            max(self.max_abs_error, other.max_abs_error),
            max(self.relative_error, other.relative_error),
            min(self.mask_iou, other.mask_iou),
            self.inputs + other.inputs,
        )

    def as_entry(self, dtype: torch.dtype) -> dict[str, float | int]:
        """The manifest's `parity`."""
        return {**asdict(self), "tolerance": TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE}


def sizes_to_try(ranges: Ranges) -> Iterator[dict[str, int]]:
    """Every combination of the ends of the dimensions' ranges, and one of sizes between them."""
    yield from (
        dict(zip(ranges, ends, strict=True)) for ends in itertools.product(*(sorted({*limits}) for limits in ranges.values()))
    )
    if ranges:
        yield {name: low + (high - low) // 3 for name, (low, high) in ranges.items()}


@torch.no_grad()
def check_parity(part: Part, run: Run, ranges: Ranges, dtype: torch.dtype) -> Parity:
    """Measure, and raise InputError, one line that names the output and its input's sizes, where it is outside the tolerance.

    Inputs that the network writes to (a cache) are compared as outputs are.
    """
    found, device = Parity(), next(part.module.parameters()).device
    for seed, sizes in enumerate(sizes_to_try(dimensions_of(part, ranges)), FIRST_SEED):
        given = {name: x.to(device) for name, x in part.sample(sizes, torch.Generator().manual_seed(seed)).items()}
        theirs, ours = ({name: x.clone() for name, x in given.items()} for _ in range(2))
        expected = dict(zip(part.outputs, as_tuple(part.module(*(theirs[name] for name in part.inputs))), strict=True))
        returned = dict(zip(part.outputs, run(ours), strict=True))
        written = [name for name, x in given.items() if not torch.equal(x, theirs[name])]
        expected |= {name: theirs[name] for name in written}
        returned |= {name: ours[name] for name in written}
        where = ", ".join(f"{name}={size}" for name, size in sizes.items()) or f"seed {seed}"
        for name, output in expected.items():
            named = f"{part.name}: {name} at {where}"
            error = _compare(output, returned[name], named, is_mask=name in part.masks)
            _refuse(error, dtype, named)
            found = found.worst_of(error)
        found.inputs += 1
    return found


def _compare(expected: Tensor, returned: Tensor, where: str, *, is_mask: bool) -> Parity:
    if expected.shape != returned.shape:
        raise InputError(f"{where} is {list(returned.shape)} (expected {list(expected.shape)}, as eager's); nothing is written")
    returned = returned.to(expected.device)
    difference = (returned.double() - expected.double()).abs()
    relative = difference.norm() / expected.double().norm().clamp(min=1e-12)
    return Parity(difference.max().item(), relative.item(), mask_iou(expected > 0, returned > 0) if is_mask else 1.0)


def mask_iou(expected: Tensor, returned: Tensor) -> float:
    """Of all masks together; 1 where both are empty."""
    either = (expected | returned).sum()
    return ((expected & returned).sum() / either).item() if either else 1.0


def _refuse(error: Parity, dtype: torch.dtype, where: str) -> None:
    """NaN is outside of every tolerance."""
    if dtype == torch.float32 and not error.max_abs_error <= TOLERANCE:
        raise InputError(
            f"{where} differs from eager by {error.max_abs_error:.3g} (expected at most {TOLERANCE:g}); nothing is written"
        )
    if dtype != torch.float32 and not error.relative_error <= HALF_TOLERANCE:
        found = f"{error.relative_error:.3g} of its norm"
        raise InputError(f"{where} differs from eager by {found} (expected at most {HALF_TOLERANCE:g}); nothing is written")
    if dtype != torch.float32 and not error.mask_iou >= HALF_IOU:
        raise InputError(
            f"{where}: masks have an IoU of {error.mask_iou:.4f} with eager's (expected at least {HALF_IOU}); nothing is written"
        )
