"""Checks and timings of SAM's mask decoder for bench.gpu: its three ops and the whole, transformers' its peer.

What is timed is the published decoder: C = 256 channels, N = 64 x 64 image tokens, 8 heads of T = 7 tokens (five outputs and a
box), R = 8 T, one mask (M = 1) of 256 x 256; checks take three masks and odd shapes as well. The ops take B prompts with image
tokens x of their own, as from the second block on, the decoder B boxes of one image. The most memory is that of transformers'
formulation of 64 prompts: some GB. The least that a case needs:

    FLOPs    token to image, image to token: 4 B N R C. Upscale, with C1 = C / 4 and C2 = C / 8: B N (8 C C1 + 32 C1 C2 + 32 C2 M).
             The backward twice that. Decoder: min(4 B N R C, 2 N C C + 2 B N T C) for the first tokens to image (absorbed, or keys
             and values once an image), 4 B N R C for the other four attentions, the upscaling, and B T C (100 C + 8 T) for the
             tokens: self-attention 8 C + 4 T and MLP 32 C in two blocks, 4 C in five cross attentions
    bytes    two an element. Forward: what goes in once and what comes out once. Backward: both once more, and the gradients once.
             Decoder: parameters, x and positions once, the logits, and B 4 N C: two blocks write x, one and the upscaling read it
             (tokens can attend to it while it is in registers)
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.mask_decoder import as_provider, build_case, build_decoder, build_providers, to_transformers
from bench.measure import Check, TimedCase, Timing, against_eager, training, with_gradients, without_grad
from kernels import mask_attention
from kernels.launch import launch, shared_bytes
from kernels.mask_attention import image_to_token, image_to_token_reference, token_to_image, token_to_image_reference
from kernels.mask_upscale import mask_upscale, mask_upscale_reference
from models.sam.mask_decoder import MaskDecoder
from models.sam.predictor import Predictor
from models.sam.replay import Replay
from models.sam.sam import Sam
from models.sam.two_way_transformer import TwoWayTransformer

C, HEADS, T = 256, 8, 7
GOAL_BANDWIDTH = 0.7 * 3.0e12  # bytes/s of image_to_token and upscale at 64 prompts
DECODER_GOALS = {1: 0.120, 64: 0.65}  # ms by prompts

# prompts, images, image tokens, channels, heads, tokens of a prompt; the odd ones fill no tile, and 33 tokens take a head at a time
SAM_ATTENTION = [(1, 1, 7), (4, 4, 7), (4, 1, 7), (2, 2, 15), (6, 2, 15)]
ODD_ATTENTION = [
    (3, 3, 256, 256, 8, 7),
    (6, 3, 256, 256, 8, 9),
    (2, 2, 201, 128, 4, 5),
    (3, 1, 1000, 64, 2, 1),
    (2, 2, 77, 256, 8, 33),
]
# prompts, height, width, channels, masks
SAM_UPSCALE = [(1, 1), (4, 1), (1, 3), (4, 3)]
ODD_UPSCALE = [(3, 16, 16, 256, 4), (2, 5, 13, 128, 1), (2, 1, 37, 256, 3)]
# Checks at small shapes that are worth compute-sanitizer's time: full tiles and ragged ones.
SANITIZED = (
    "token to image (4",
    "token to image (2, 2, 201",
    "image to token (4, 1",
    "image to token (2, 2, 201",
    "upscale (4, 8, 8",
    "upscale (2, 5",
)


class Case(NamedTuple):
    """An op at one shape. `order(op)`, as `order` of any other formulation, takes leaves and constants; `output` is a shape."""

    op: Callable
    reference: Callable
    leaves: list[Tensor]
    constants: list[Tensor]
    order: Callable[[Callable], Callable]
    output: tuple[int, ...]


def _source(device, dtype):
    """A seeded `torch.randn` on the device."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, device=device, generator=generator).to(dtype)


def token_to_image_case(device, dtype, prompts, images, N, C, heads, tokens) -> Case:
    """A prompt an image. Scores have a variance of two."""
    randn = _source(device, dtype)
    queries, image, pe = randn(prompts, heads * tokens, C) / C**0.5, randn(images, N, C), randn(N, C)
    return Case(token_to_image, token_to_image_reference, [queries, image], [pe], lambda op: op, queries.shape)


def image_to_token_case(device, dtype, prompts, images, N, C, heads, tokens) -> Case:
    randn, R = _source(device, dtype), heads * tokens
    image, pe = randn(images, N, C), randn(N, C)
    leaves = [image, randn(prompts, R, C) / C**0.5, randn(prompts, R), randn(prompts, R, C), 1 + 0.1 * randn(C), randn(C)]

    def order(op):
        return lambda image, keys, bias, values, weight, shift, pe: op(image, pe, keys, bias, values, weight, shift, heads)

    return Case(image_to_token, image_to_token_reference, leaves, [pe], order, (prompts, N, C))


def upscale_case(device, dtype, prompts, height, width, C, masks) -> Case:
    randn, C1, C2 = _source(device, dtype), C // 4, C // 8
    leaves = [randn(prompts, height * width, C), randn(C, C1, 2, 2) / C**0.5, 0.1 * randn(C1), 1 + 0.1 * randn(C1), 0.1 * randn(C1)]
    leaves += [randn(C1, C2, 2, 2) / C1**0.5, 0.1 * randn(C2), randn(prompts, masks, C2)]

    def order(op):
        return lambda image, *rest: op(image, height, *rest)

    return Case(mask_upscale, mask_upscale_reference, leaves, [], order, (prompts, masks, 4 * height, 4 * width))


def _run_op(case: Case, function: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of one formulation."""
    return with_gradients(case.order(function), case.leaves, dtype, *case.constants)


def _check_op(case: Case):
    dtype = case.leaves[0].dtype
    ours, eager = (_run_op(case, function, dtype) for function in (case.op, case.reference))
    return against_eager(ours, eager, _run_op(case, case.reference, torch.float64), dtype)


def _check_op_bits(case: Case):
    return _different_bits(lambda: _run_op(case, case.op, torch.bfloat16))


def _different_bits(run: Callable[[], list[Tensor]]) -> tuple[float, float]:
    """How many of the results differ between two runs."""
    return float(sum(not torch.equal(first, second) for first, second in zip(run(), run(), strict=True))), 0.0


def _decoded(decoder, case: dict, dtype, multimask: bool) -> list[Tensor]:
    """Masks, their gradient of the image embedding, and IoU, as float64.

    The gradients of the tokens pass through ReLUs that a rounding switches, which moves them by a tenth in either formulation.
    """
    decode, (image, *rest) = as_provider(decoder), (tensor.to(dtype) for tensor in case.values())
    masks = with_gradients(lambda image: decode(image, *rest, multimask)[0], [image], dtype)
    return [*masks, without_grad(decode, image, *rest, multimask)[1].double()]


def _check_decoder(device, side, prompts, multimask, judged):
    """Against transformers' in float64, on weights and inputs that are rounded to bfloat16 first."""
    decoder, case = build_decoder(device, torch.bfloat16), build_case(prompts, device, torch.bfloat16, side)
    ours = _decoded(decoder, case, torch.bfloat16, multimask)
    eager, truth = (
        _decoded(to_transformers(decoder).to(device, dtype), case, dtype, multimask) for dtype in (torch.bfloat16, torch.float64)
    )
    return against_eager(ours[judged], eager[judged], truth[judged])


def _check_decoder_bits(device, side):
    decoder, case = build_decoder(device, torch.bfloat16), build_case(4, device, torch.bfloat16, side)
    return _different_bits(lambda: _decoded(decoder, case, torch.bfloat16, True))


def _check_without_gradients(device, side, prompts):
    """The masks of projections that are folded, which gradients do not see."""
    decoder, case = build_decoder(device, torch.bfloat16), build_case(prompts, device, torch.bfloat16, side)

    def masks(decoder, dtype):
        return [without_grad(as_provider(decoder), *(tensor.to(dtype) for tensor in case.values()), True)[0].double()]

    theirs = {dtype: to_transformers(decoder).to(device, dtype) for dtype in (torch.bfloat16, torch.float64)}
    eager, truth = (masks(theirs[dtype], dtype) for dtype in theirs)
    return against_eager(masks(decoder, torch.bfloat16), eager, truth)


def _predictors(device, side) -> tuple[Predictor, Predictor]:
    """One that replays graphs on CUDA and one that launches every kernel, of one decoder with random weights and one image."""
    torch.manual_seed(0)
    model = Sam(torch.nn.Conv2d(3, C, 16, stride=16), 16 * side, side, "imagenet", "corner").to(device, torch.bfloat16)
    replayed, launched = Predictor(model), Predictor(model)
    launched._decode = launched._run
    for predictor in (replayed, launched):
        predictor.set_image(np.random.default_rng(0).integers(0, 255, (12 * side, 16 * side, 3), dtype=np.uint8))
    return replayed, launched


def _check_predictor(device, side):
    """How many results of replayed graphs are not those of the same kernels launched; one more where nothing was captured."""
    predictors, different = _predictors(device, side), 0
    for shift in range(4):
        for multimask in (False, True):
            boxes = [[2.0 + shift, 3.0, 6.0 * side, 5.0 * side]]
            replayed, launched = (predictor.predict(boxes=boxes, multimask_output=multimask) for predictor in predictors)
            different += sum(not torch.equal(mine, other) for mine, other in zip(replayed, launched, strict=True))
    failed = isinstance(predictors[0]._decode, Replay) and predictors[0]._decode.failed
    return float(different + failed), 0.0


def checks(device: torch.device, tiny: bool):
    """Every op and the decoder against float64, at the decoder's shapes and odd ones."""
    side = 8 if tiny else 64
    attention = [(*sizes[:2], side * side, C, HEADS, sizes[2]) for sizes in SAM_ATTENTION]
    upscale = [(prompts, side, side, C, masks) for prompts, masks in SAM_UPSCALE]
    ops = {
        "token to image": (token_to_image_case, [sizes for sizes in attention + ODD_ATTENTION if sizes[0] == sizes[1]]),
        "image to token": (image_to_token_case, attention + ODD_ATTENTION),
        "upscale": (upscale_case, upscale + ODD_UPSCALE),
    }
    for name, (build, shapes) in ops.items():
        for sizes in shapes:
            yield Check(f"{name} {sizes}", lambda b=build, s=sizes: _check_op(b(device, torch.bfloat16, *s)))
        yield Check(f"{name}, float16 {shapes[1]}", lambda b=build, s=shapes[1]: _check_op(b(device, torch.float16, *s)))
        for sizes in shapes[1:3]:
            yield Check(f"{name}, same bits twice {sizes}", lambda b=build, s=sizes: _check_op_bits(b(device, torch.bfloat16, *s)))
    for prompts, masks in SAM_UPSCALE:
        run = partial(_check_decoder, device, side, prompts, masks > 1, slice(2))
        yield Check(f"decoder, B={prompts}, M={masks}", run)
    yield Check("decoder, IoU of B=8", partial(_check_decoder, device, side, 8, True, slice(2, 3)))
    yield Check("decoder, same bits twice", lambda: _check_decoder_bits(device, side))
    for prompts in (1, 4):
        yield Check(f"decoder without gradients, B={prompts}", partial(_check_without_gradients, device, side, prompts))
    yield Check("predictor, replayed as launched", partial(_check_predictor, device, side))


def _decoder_work(B, side) -> tuple[float, float]:
    """FLOPs and bytes of the decoder."""
    N, R, token = side * side, HEADS * T, T * C * (100 * C + 8 * T)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MaskDecoder(TwoWayTransformer()).parameters())
    first = min(4 * B * N * R * C, 2 * N * C * C + 2 * B * N * T * C)
    flops = first + B * (16 * N * R * C + token + _upscale_flops(N, 1))
    return flops, 2 * (parameters + 2 * N * C + B * N * (4 * C + 16))


def _decoder_timings(device, side, numbers):
    def build(B):
        providers, case = build_providers(device, torch.bfloat16, compile=True), build_case(B, device, torch.bfloat16, side)
        names = {"ours": "ours", "transformers": "transformers", "compile": "torch.compile"}
        runs = {name: partial(without_grad, providers[theirs], **case) for name, theirs in names.items()}
        return Timing(runs, *_decoder_work(B, side), DECODER_GOALS.get(B), graphed=B == 1)

    def build_predictor():
        boxes = [[2.0, 3.0, 6.0 * side, 5.0 * side]]
        replayed, launched = (
            partial(predictor.decode, boxes=boxes, multimask_output=False) for predictor in _predictors(device, side)
        )
        replayed()  # the second call captures
        return Timing({"ours": replayed, "eager": launched}, *_decoder_work(1, side))

    for B in numbers:
        yield TimedCase(f"decoder, B={B}", partial(build, B))
    yield TimedCase("predictor, B=1, replayed (ours) and launched (eager)", build_predictor, peers=False)


def _upscale_flops(N: int, masks: int) -> int:
    """Of one prompt."""
    C1, C2 = C // 4, C // 8
    return N * (8 * C * C1 + 32 * C1 * C2 + 32 * C2 * masks)


def _op_timings(name, build, flops, numbers, trained):
    """An op forward at each number of prompts, forward and backward at `trained`; `flops` of one prompt."""

    def timing(B, backward):
        case = build(B)
        formulations = {"ours": case.op, "eager": case.reference, "compile": torch.compile(case.reference)}
        ordered = {provider: case.order(function) for provider, function in formulations.items()}
        gradients = sum(leaf.numel() for leaf in case.leaves)
        once = gradients + sum(constant.numel() for constant in case.constants) + math.prod(case.output)
        if backward:
            leaves = [leaf.requires_grad_() for leaf in case.leaves]
            seed = torch.randn(case.output, device=leaves[0].device, dtype=leaves[0].dtype)
            runs = {provider: training(op, leaves, *case.constants, grad_output=seed) for provider, op in ordered.items()}
            return Timing(runs, 3 * B * flops, 2 * (2 * once + gradients))
        tensors = (*case.leaves, *case.constants)
        runs = {provider: partial(without_grad, op, *tensors) for provider, op in ordered.items()}
        goal = 2e3 * once / GOAL_BANDWIDTH if B == 64 and name != "token to image" else None
        return Timing(runs, B * flops, 2 * once, goal, graphed=B == 1)

    for B, backward in [(B, False) for B in numbers] + [(trained, True)]:
        yield TimedCase(f"{name} fwd{'+bwd' * backward}, B={B}", partial(timing, B, backward))


def timings(device: torch.device, tiny: bool):
    """The decoder and its ops at 1, 8 and 64 prompts."""
    side, numbers, trained = (8, (1, 2), 2) if tiny else (64, (1, 8, 64), 8)
    N, dtype = side * side, torch.bfloat16
    yield from _decoder_timings(device, side, numbers)
    sizes, attention = (N, C, HEADS, T), 4 * N * HEADS * T * C
    yield from _op_timings(
        "token to image", lambda B: token_to_image_case(device, dtype, B, B, *sizes), attention, numbers, trained
    )
    yield from _op_timings(
        "image to token", lambda B: image_to_token_case(device, dtype, B, B, *sizes), attention, numbers, trained
    )
    upscale = _upscale_flops(N, 1)
    yield from _op_timings("upscale", lambda B: upscale_case(device, dtype, B, side, side, C, 1), upscale, numbers, trained)


# Image tokens of a tile, warps, stages: other ways to launch image_to_token.
TILE_VARIANTS = [(32, 4, 1), (32, 8, 1), (32, 8, 2), (64, 4, 2), (64, 8, 1), (64, 16, 2), (128, 8, 1), (128, 16, 1)]


def _tile_variants(device, B, N):
    case = image_to_token_case(device, torch.bfloat16, B, 1, N, C, HEADS, T)
    (image, *rest), [pe] = case.leaves, case.constants
    z = image.new_empty(case.output)
    constants = mask_attention._head_constants(C, T, HEADS, shared_bytes(device))
    arguments = (image, pe, *rest, z, B, HEADS, T, N, 1e-5)

    def run(**others):
        chosen = constants | others
        launch(mask_attention._image_to_token_kernel, (-(-N // chosen["TOKENS"]), B), *arguments, **chosen)

    providers = {"ours": run}
    for tokens, warps, stages in TILE_VARIANTS:
        providers[f"{tokens} x {warps} w, {stages}"] = partial(run, TOKENS=tokens, num_warps=warps, num_stages=stages)
    return Timing(providers, 4 * B * N * HEADS * T * C, 2 * (image.numel() + z.numel()))


def variants(device: torch.device, tiny: bool):
    """image_to_token with other tiles."""
    if device.type == "cuda":
        B, N = (2, 64) if tiny else (64, 4096)
        yield TimedCase(f"image to token, B={B}, other launches", partial(_tile_variants, device, B, N))
