"""Every kernel at offsets beyond 2^31 elements gives what it gives at the beginning of its tensors.

TRITON_INTERPRET=1 pytest -m triton tests/kernels/test_far_offsets.py

One program runs, at a far place of tensors that are files with holes: only what it touches takes memory. The interpreter computes
offsets in the types that the body gives them, 32 bits where nothing makes them wider.
"""

from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import (
    group_advantage,
    grpo_loss,
    linear_grpo,
    linear_logprob,
    mask_attention,
    mask_upscale,
    moe_dispatch,
    moe_router,
    prefix_attention,
    prefix_decode,
    sample,
)
from kernels.grpo_terms import GRPOLoss, TokenInputs
from kernels.launch import LARGE_SHARED, launch

pytestmark = pytest.mark.triton
BEYOND = 2**31


class Each(NamedTuple):
    """A tensor argument of which the program at a place has a part of its own: `part`.

    With `rows` the tensor has so many rows of all places, and the part a column of them.
    """

    part: Tensor
    rows: int = 1


# Arguments: a tensor of which each place's part is that place; how many there are; where a place's rows begin and end, the one row.
PLACE, PLACES, BOUNDS = "place", "places", "bounds"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LOSS = GRPOLoss("grpo", beta=0.1)
GIVEN = TokenInputs(Each(randn(1)), Each(randn(1)), Each(randn(1)))
C, N, R, HEADS, MASKS = 16, 64, 6, 2, 2
TILES = {"C": C, "ROWS": 16, "TOKENS": N}
PADDED, PADDED_BACKWARD = (
    mask_attention._head_constants(C, R // HEADS, HEADS, LARGE_SHARED, backward) | {"TOKENS": N} for backward in (False, True)
)
UPSCALE = mask_upscale._constants(C, C, C, MASKS, N)
STEPS = (randn(4, C, C), randn(C), randn(C), randn(C), randn(C, 4 * C), randn(C))
S, P, T = 40, 24, 8  # a prompt and two answers, one head
ALONG = prefix_attention.Strides(S * C, C, C)
ROW, DECODE = prefix_decode.RowStrides(C, C), prefix_decode._constants(C, 1, torch.float32, LARGE_SHARED)
ATTENTION = prefix_attention._constants(C, torch.float32, LARGE_SHARED)
IMAGE, ROWS, SCORES = Each(randn(N, C)), Each(randn(R, C)), Each(randn(R))


def kernels() -> dict[str, tuple[Any, int, tuple[Any, ...], dict[str, Any]]]:
    """Kernel, the axis of the grid that is far, arguments and constants."""
    ids, one, tokens = Each(torch.tensor([5])), Each(randn(1)), Each(randn(1100))
    flags, counter = LOSS.kernel_flags, torch.zeros(1, dtype=torch.int32)
    row, scores, mode = Each(randn(2**16)), Each(randn(100)), Each(torch.tensor([7], dtype=torch.int32))
    softmax = linear_logprob.SoftmaxStats(one, Each(1 + randn(1).abs()), one)
    per_row = (PLACE, ids, one, one, GIVEN, linear_grpo.TokenOutputs(one, one))
    head = (ROWS, SCORES, ROWS, randn(C), randn(C))
    hyper, logits = Each(randn(MASKS, C)), Each(randn(MASKS, 16 * N))
    STATES, SUMS, START = Each(randn(S, C)), Each(randn(S)), Each(torch.tensor([2], dtype=torch.int32))
    small = [Each(torch.zeros(shape)) for shape in ((C, 4 * C), (4 * C,), (2, C), (mask_upscale.ROWS, C))]
    return {
        "advantages": (
            group_advantage._advantages_kernel, 0, (Each(randn(2**20)), Each(randn(2**20)), BEYOND, 2**20, 1e-4),
            {"SCALE": "group", "GROUPS": 1, "WIDTH": 2**20},
        ),
        "loss": (
            grpo_loss._loss_kernel, 0,
            (tokens, one, *[tokens] * 5, None, tokens, Each(torch.zeros(16)), counter, torch.zeros(1), torch.zeros(7),
             2**30, 1100, *LOSS.numbers, 3.0, 1),
            flags | {"SEQUENCE": True, "BLOCK": 256},
        ),
        "logit stats": (
            linear_logprob._stats_kernel, 0, (row, 2**16, ids, Each(torch.zeros(5), rows=5), PLACES, 0, 300, 1.0),
            linear_logprob.STATS_CONSTANTS,
        ),
        "logit gradient": (
            linear_logprob._gradient_kernel, 0, (row, 2**16, 300, 1.0, ids, softmax, one, one),
            {"ENTROPY": True} | linear_logprob.GRADIENT_CONSTANTS,
        ),
        "grpo row": (
            linear_grpo._row_kernel, 0, (row, 2**16, *per_row, 300, 1, 1.0, LOSS.numbers),
            {"GRADIENT": True} | flags | {"BLOCK": 256, "STAGES": 1},
        ),
        "token to image": (
            mask_attention._token_to_image_kernel, 2,
            (ROWS, IMAGE, randn(N, C), Each(torch.zeros(R, C)), Each(torch.zeros(R, 2)), R, N, 1), TILES,
        ),
        "merge": (
            mask_attention._merge_kernel, 1,
            (Each(randn(2, R, C)), Each(1 + randn(2, R, 2).abs()), ROWS, SCORES, R, 2), {"C": C, "SPLITS": 2},
        ),
        "token to image, backward": (
            mask_attention._token_to_image_backward_kernel, 1,
            (ROWS, ROWS, IMAGE, randn(N, C), SCORES, SCORES, Each(torch.zeros(N, R)), Each(torch.zeros(N, C)), R, N), TILES,
        ),
        "image to token": (
            mask_attention._image_to_token_kernel, 1,
            (IMAGE, randn(N, C), *head, Each(torch.zeros(N, C)), 1, HEADS, R // HEADS, N, 1e-5), PADDED,
        ),
        "image to token, backward": (
            mask_attention._image_to_token_backward_kernel, 1,
            (IMAGE, IMAGE, randn(N, C), *head[:-1], Each(torch.zeros(N, R)), Each(torch.zeros(N, R)), Each(torch.zeros(N, C)),
             Each(torch.zeros(N, C)), Each(torch.zeros(2, C)), 1, HEADS, R // HEADS, N, 1e-5), PADDED_BACKWARD,
        ),
        "upscale": (mask_upscale._upscale_kernel, 1, (IMAGE, *STEPS, hyper, logits, N, 8, 1e-6), UPSCALE),
        "upscale, backward": (
            mask_upscale._upscale_backward_kernel, 1,
            (logits, IMAGE, *STEPS, hyper, Each(torch.zeros(N, 4 * C)), *small, N, 8, 1e-6), UPSCALE | {"ROWS": mask_upscale.ROWS},
        ),
        "prefix attention": (
            prefix_attention._attention_kernel, 2,
            (STATES, STATES, STATES, Each(torch.zeros(S, C)), Each(torch.zeros(S)), START, ALONG, ALONG, ALONG, S, P, T, 0.3, 1),
            ATTENTION,
        ),
        "prefix queries' gradient": (
            prefix_attention._query_gradient_kernel, 2,
            (STATES, STATES, STATES, STATES, STATES, SUMS, Each(torch.zeros(S)), Each(torch.zeros(S, C)), START,
             ALONG, ALONG, ALONG, ALONG, S, P, T, 0.3, 1), ATTENTION,
        ),
        "prefix keys' gradient": (
            prefix_attention._key_gradient_kernel, 2,
            (STATES, STATES, STATES, STATES, SUMS, SUMS, Each(torch.zeros(S, C)), Each(torch.zeros(S, C)), START,
             ALONG, ALONG, ALONG, ALONG, S, P, T, 0.3, 1, 1), ATTENTION,
        ),
        "decode, prompts": (
            prefix_decode._prompt_kernel, 2,
            (Each(randn(C)), STATES, STATES, Each(torch.zeros(1, C)), Each(torch.zeros(2)), START, BOUNDS, ROW, ALONG, ALONG,
             S, PLACES, 0.3, 1, 1),
            DECODE,
        ),
        "decode, own tokens": (
            prefix_decode._own_kernel, 1,
            (Each(randn(C)), STATES, STATES, Each(torch.zeros(1, C)), Each(torch.tensor([0.3, 2.0])), Each(torch.zeros(C)),
             torch.tensor([20]), ROW, ALONG, ALONG, PLACES, 0.3, 1, 1), DECODE,
        ),
        "sample, tiles": (
            sample._tile_kernel, 0,
            (scores, Each(torch.ones(100, dtype=torch.uint8)), None, None, Each(torch.zeros(2)), mode, 100, 1.1, 0.9),
            {"PENALISE": True, "CUT": False} | sample._tile_constants(100),
        ),
        "sample": (
            sample._choose_kernel, 0,
            (scores, None, one, mode, Each(torch.tensor([2.0, 30.0])), mode, one, Each(torch.zeros(1, dtype=torch.int64)), one,
             100, 1, 1.1, 0.9),
            {"GREEDY": False, "PENALISE": False, "CUT": True, "TILES": 1} | sample._tile_constants(100),
        ),
        "sample, cut": (
            sample._cut_kernel, 0, (scores, None, one, mode, 100, 1.1, 0.9, 50.0, 0.05, -3.0),
            {"PENALISE": False, "TOP_K": False, "TOP_P": True} | sample._cut_constants(100),
        ),
        "moe combine": (
            moe_dispatch._collect_kernel, 0, (Each(randn(512)), PLACE, Each(randn(1)), Each(torch.zeros(512)), 512),
            moe_dispatch._collect_constants(512, 1),
        ),
        "moe combine, backward": (
            moe_dispatch._spread_kernel, 0,
            (Each(randn(512)), PLACE, PLACE, Each(randn(1)), Each(randn(512)), Each(torch.zeros(512)), Each(torch.zeros(1)), 512),
            moe_dispatch._spread_constants(512, 1),
        ),
        "moe gate": (
            moe_router._gate_kernel, 0,
            (Each(randn(32, 24)), randn(4, 24), None, Each(torch.zeros(32, 4)), Each(torch.zeros(64, dtype=torch.int32)),
             Each(torch.zeros(64)), Each(torch.zeros(4, dtype=torch.int32)), Each(torch.zeros(4)), Each(torch.zeros(1)),
             BEYOND - 1, 24, 4, 32), moe_router._gate_constants(4, 2, False, True),
        ),
        "moe logits, backward": (
            moe_router._logit_gradient_kernel, 0,
            (Each(randn(32)), randn(1), randn(1), Each(randn(16, 4)), Each(torch.ones(32, dtype=torch.int32)),
             Each(torch.ones(32, dtype=torch.int32)), torch.ones(4, dtype=torch.int32), Each(torch.zeros(16, 4)),
             BEYOND - 1, 4, 1e-7),
            moe_router._logit_constants(4, 2, False, True),
        ),
    }  # fmt: skip


def parts(arguments: Any) -> list[Each]:
    """All of them, those in tuples too."""
    if isinstance(arguments, Each):
        return [arguments]
    return [part for member in arguments for part in parts(member)] if isinstance(arguments, tuple) else []


@pytest.fixture
def run_at(tmp_path, monkeypatch):
    """A function that launches one program at a place and returns what its parts then hold."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, files = interpreter.interpreter_builder, count()
    # what is copied back to a GPU is here the same memory, all of it
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)

    def run(kernel: Any, axis: int, place: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> list[Tensor]:
        made: list[Tensor] = []  # the parts

        def laid(argument: Any) -> Any:
            if isinstance(argument, Each):
                (part, rows), path = argument, str(tmp_path / str(next(files)))
                whole = torch.from_file(path, shared=True, size=(place + 1) * part.numel(), dtype=part.dtype)
                by_row = part.view(rows, -1)
                made.append(whole.view(rows, place + 1, -1)[:, place].copy_(by_row))
                return whole
            if argument is PLACE:
                whole = torch.from_file(str(tmp_path / str(next(files))), shared=True, size=place + 1, dtype=torch.int64)
                whole[place] = place
                return whole
            if argument is BOUNDS:
                whole = torch.from_file(str(tmp_path / str(next(files))), shared=True, size=place + 2, dtype=torch.int64)
                whole[place:] = torch.tensor([place, place + 1])
                return whole
            if argument is PLACES:
                return place + 1
            if isinstance(argument, tuple):
                return type(argument)(*map(laid, argument))
            return argument.clone() if isinstance(argument, Tensor) else argument

        where = [0, 0, 0]
        where[axis] = place
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", tuple(i + 1 for i in where)))
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", tuple(where)))
        launch(kernel, (1,), *map(laid, arguments), **constants)
        return made

    return run


@pytest.mark.parametrize("name", list(kernels()))
def test_far_places_give_what_the_first_gives(name, run_at):
    kernel, axis, arguments, constants = kernels()[name]
    largest = max(each.part.numel() for each in parts(arguments))
    first, far = (run_at(kernel, axis, place, arguments, constants) for place in (0, BEYOND // largest + 3))
    begun = [each.part for each in parts(arguments)]
    assert any(not torch.equal(part.flatten(), was.flatten()) for part, was in zip(first, begun, strict=True))  # it did something
    for index, (near, away) in enumerate(zip(first, far, strict=True)):
        assert torch.equal(near, away), f"part {index}"


# Kernels whose programs read what is not their own: int32 counts the choices that one places, and the other sweeps all tokens.
NOT_BY_PLACE = {moe_router._place_kernel, moe_router._gate_gradient_kernel}


def test_every_kernel_is_tried():
    modules = (
        group_advantage,
        grpo_loss,
        linear_grpo,
        linear_logprob,
        mask_attention,
        mask_upscale,
        moe_dispatch,
        moe_router,
        prefix_attention,
        prefix_decode,
        sample,
    )
    listed = {config.kernel for module in modules for config in module.launch_configs()}
    assert listed - NOT_BY_PLACE == {kernel for kernel, *_ in kernels().values()}
