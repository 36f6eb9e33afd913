"""What is refused, and what is not: by type, by the output, by the size at which it happens, and where a cache was written."""

import math
import re

import pytest
import torch
from torch import nn

from engine.errors import InputError
from engine.export.parity import check_parity, mask_iou, sizes_to_try
from engine.export.part import as_tuple, example_sizes
from models.exported import Part
from tests.engine.export.small_model import small_model

RANGES = {"batch": (1, 5), "tokens": (2, 9)}


def run_of(part, change=lambda name, output, inputs: output):
    """What runs a part eagerly and changes its outputs."""

    def run(inputs):
        outputs = as_tuple(part.module(*(inputs[name] for name in part.inputs)))
        return tuple(change(name, output, inputs) for name, output in zip(part.outputs, outputs, strict=True))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_is_equal_to_itself(dtype):
    part = small_model(dtype).parts[1]
    found = check_parity(part, run_of(part), RANGES, dtype)
    assert (found.max_abs_error, found.relative_error, found.mask_iou, found.inputs) == (0.0, 0.0, 1.0, 5)


@pytest.mark.parametrize(
    ("dtype", "change", "message"),
    [
        (torch.float32, lambda name, y, inputs: y + 2e-4, "y at batch=1, tokens=2 differs from eager by 0.0002"),
        (torch.float32, lambda name, y, inputs: y * math.nan, "y at batch=1, tokens=2 differs from eager by nan"),
        (torch.float32, lambda name, y, inputs: y + (name == "total"), "total at batch=1, tokens=2 differs from eager by 1"),
        (torch.float32, lambda name, y, inputs: y + (len(y) == 5), "y at batch=5, tokens=2 differs from eager by 1"),
        (torch.bfloat16, lambda name, y, inputs: y * 1.05, r"y at batch=1, tokens=2 differs from eager by 0.0\d+ of its norm"),
        (torch.float16, lambda name, y, inputs: y - 0.01 * y.abs().mean(), r"y at .*: masks have an IoU of 0.9\d+ with eager's"),
        (torch.float32, lambda name, y, inputs: y[:0], r"y at batch=1, tokens=2 is \[0, 2, 4\] \(expected \[1, 2, 4\]"),
    ],
)
def test_what_differs_is_refused_by_name(dtype, change, message):
    part = small_model(dtype).parts[1]
    with pytest.raises(InputError) as raised:
        check_parity(part, run_of(part, change), {**RANGES, "tokens": (2, 400)}, dtype)
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_may_round_in_another_order(dtype):
    part = small_model(dtype).parts[0]
    found = check_parity(part, run_of(part, lambda name, y, inputs: y * 1.01), RANGES, dtype)
    assert 0 < found.relative_error < 2e-2


class Cache(nn.Module):
    """Writes what it is given into a cache, and returns the cache's sum."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, cache):
        cache.copy_(x * self.scale)
        return cache.sum()


def test_a_cache_that_is_not_written_is_found():
    def draw(sizes, generator):
        return {"x": torch.randn(3, generator=generator), "cache": torch.zeros(3)}

    part = Part("step", Cache(), {"x": (3,), "cache": (3,)}, {"total": ()}, draw)
    assert check_parity(part, run_of(part), {}, torch.float32).max_abs_error == 0
    with pytest.raises(InputError, match="^step: cache at seed 1 differs from eager"):
        check_parity(part, lambda inputs: ((inputs["x"]).sum(),), {}, torch.float32)


def test_every_end_of_every_range_is_tried_and_none_of_them_is_traced():
    tried = list(sizes_to_try(RANGES))
    assert {(sizes["batch"], sizes["tokens"]) for sizes in tried} == {(1, 2), (1, 9), (5, 2), (5, 9), (2, 4)}
    assert example_sizes(RANGES) == {"batch": 2, "tokens": 3}
    assert list(sizes_to_try({})) == [{}]


def test_masks_that_are_both_empty_are_equal():
    nothing, all_of_it = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert mask_iou(nothing, nothing) == 1 and mask_iou(nothing, all_of_it) == 0
    assert mask_iou(all_of_it, torch.tensor([True, False, True, True])) == 0.75
