"""Checks and timings of the GRPO kernels for bench.gpu: advantages, loss from log-probs, loss from logits, and the head.

The shapes are those of a 2 to 3 billion parameter Qwen-VL: H = 2048, V = 151936, 16384 tokens of answers. FLOPs and bytes are
the least the case needs: 2 N H V a GEMM; logits read once forward, and read and written once for the gradient.
"""

import math
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from bench.measure import Check, TimedCase, Timing, against_eager, relative_errors, training, with_gradients, without_grad
from kernels import linear_grpo
from kernels.group_advantage import group_advantages, group_advantages_reference
from kernels.grpo_loss import grpo_loss, grpo_loss_reference
from kernels.grpo_terms import GRPOLoss, TokenInputs
from kernels.launch import launch, shared_bytes
from kernels.linear_grpo import TokenOutputs, linear_grpo_loss, linear_grpo_loss_reference
from kernels.linear_logprob import LOG2E, linear_logprob, linear_logprob_reference

VOCABULARY = 151936
LOSS = GRPOLoss("grpo", epsilon=0.2, epsilon_high=0.28)
# Checks at small shapes that are worth compute-sanitizer's time: every kernel, an aligned and an odd vocabulary.
SANITIZED = (
    "advantages by",
    "loss grpo, token, (3, 77)",
    "loss grpo, sequence, (3, 77)",
    "log-probs and entropy",
    "head grpo, token",
)


def head_inputs(device, rows, tokens, hidden, vocabulary, dtype=torch.bfloat16):
    """Seeded leaf hidden (B, T, H) and weight (V, H), and the other arguments of the loss; ragged answers for checks."""
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(rows, tokens, hidden, device=device, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=device, generator=generator) * 2 * hidden**-0.5).to(dtype).requires_grad_()
    ids = torch.randint(0, vocabulary, (rows, tokens), device=device, generator=generator)
    advantages = torch.randn(rows, device=device, generator=generator)
    return states, weight, ids, advantages, torch.ones(rows, tokens, device=device)


def loss_inputs(device, rows, tokens, seed=0):
    """Seeded (logprobs, advantages, mask, old and reference log-probs) of ragged answers."""
    generator = torch.Generator(device).manual_seed(seed)
    logprobs = -4 * torch.rand(rows, tokens, device=device, generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows, 1), device=device, generator=generator)
    mask = (torch.arange(tokens, device=device) < lengths).long()
    old, ref = (logprobs + 0.2 * torch.randn(rows, tokens, device=device, generator=generator) for _ in range(2))
    return logprobs, torch.randn(rows, device=device, generator=generator), mask, {"old_logprobs": old, "ref_logprobs": ref}


def _check_advantages(device, scale):
    rewards = torch.randint(0, 5, (4096,), device=device) * 0.37
    rewards[::7] = torch.nan
    exact = group_advantages_reference(rewards.double(), 8, scale_rewards=scale)
    return (group_advantages(rewards, 8, scale_rewards=scale) - exact).abs().max().item(), 1e-5


def _check_loss(device, shape, loss, num_items):
    logprobs, advantages, mask, given = loss_inputs(device, *shape)
    rest, options = (advantages, mask, loss), given | {"num_items": num_items}
    ours = with_gradients(grpo_loss, [logprobs], torch.float32, *rest, **options)
    truth = with_gradients(grpo_loss_reference, [logprobs], torch.float64, *rest, **options)
    return relative_errors(ours, truth).max().item(), 1e-5


def _check_logprob(device, shape, temperature):
    rows, hidden, vocabulary = shape
    states, weight, ids, _, _ = head_inputs(device, 1, rows, hidden, vocabulary)
    ids = ids[0].clone()
    ids[::5] = -100
    gains = torch.randn(2, rows, device=device)

    def both(head):
        def loss(states, weight):
            logprobs, entropy = head(states[0], weight, ids, temperature=temperature)
            return (gains[0] * logprobs + gains[1] * entropy).sum()

        return loss

    eager, truth = (with_gradients(both(linear_logprob_reference), [states, weight], d) for d in (torch.bfloat16, torch.float64))
    return against_eager(with_gradients(both(linear_logprob), [states, weight], torch.bfloat16), eager, truth)


def _check_head(device, shape, loss):
    states, weight, ids, advantages, mask = head_inputs(device, *shape)
    mask[1] = 0
    mask[0, shape[1] // 2 :] = 0
    rest = (ids, advantages, mask, loss)
    with torch.no_grad():
        chosen, _ = linear_logprob_reference(states.flatten(0, 1).float(), weight.float(), ids.flatten())
    # Steps of the policy whose ratios, 0.66 to 1.52, lie clear of every clip edge: there a rounding would switch a gradient off.
    steps = torch.tensor([-0.42, -0.14, 0.14, 0.42], device=device)
    generator = torch.Generator(device).manual_seed(1)
    old = chosen.view(ids.shape) + steps[torch.randint(0, 4, ids.shape, device=device, generator=generator)]
    given = {"old_logprobs": old, "ref_logprobs": old - 0.1}
    ours = with_gradients(linear_grpo_loss, [states, weight], torch.bfloat16, *rest, chunk_rows=200, **given)
    eager, truth = (
        with_gradients(linear_grpo_loss_reference, [states, weight], dtype, *rest, **given)
        for dtype in (torch.bfloat16, torch.float64)
    )
    return against_eager(ours, eager, truth)


def _check_bits(device, shape):
    inputs = head_inputs(device, *shape)
    first, second = (with_gradients(linear_grpo_loss, inputs[:2], torch.bfloat16, *inputs[2:], LOSS) for _ in range(2))
    return float(sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))), 0.0


def _check_offsets(device, rows):
    """A chunk of more than 2^31 logits against small ones."""
    inputs = head_inputs(device, rows // 1024, 1024, 64, VOCABULARY)
    large, small = (
        with_gradients(linear_grpo_loss, inputs[:2], torch.bfloat16, *inputs[2:], LOSS, chunk_rows=size) for size in (rows, 1024)
    )
    return relative_errors(large, small).max().item(), 2**-7


def _described(loss: GRPOLoss) -> str:
    return f"{loss.loss_type}, {loss.importance_sampling_level}"


def checks(device: torch.device, tiny: bool):
    """Every kernel against float64, at shapes aligned and odd."""
    vocabulary, tokens = (1000, 16) if tiny else (VOCABULARY, 128)
    for scale in ("group", "batch", "none"):
        yield Check(f"advantages by {scale}", partial(_check_advantages, device, scale))
    kl, cispo = GRPOLoss("grpo", beta=0.04, delta=1.4, max_completion_length=64), GRPOLoss("cispo", epsilon_high=1.2)
    for loss, items in (
        (kl, None),
        (replace(kl, loss_type="dapo"), 500.0),
        (replace(kl, loss_type="dr_grpo", use_bias_correction_kl=False), None),
        (cispo, None),
        (replace(kl, importance_sampling_level="sequence"), None),
    ):
        for shape in ((32, 1024), (3, 77), (300, 5)):
            yield Check(f"loss {_described(loss)}, {shape}", partial(_check_loss, device, shape, loss, items))
    for rows, temperature in (
        ((4 * tokens, 256, vocabulary), 1.0),
        ((37, 64, 50257 if not tiny else 257), 0.7),
        ((5, 64, 33), 1.0),
    ):
        yield Check(f"log-probs and entropy {rows}", partial(_check_logprob, device, rows, temperature))
    for sizes in ((4, tokens, 256, vocabulary), (4, 9, 64, 257)):
        for loss in (LOSS, replace(LOSS, beta=0.04, importance_sampling_level="sequence"), cispo):
            yield Check(f"head {_described(loss)}, {sizes}", partial(_check_head, device, sizes, loss))
    yield Check("head, same bits twice", lambda: _check_bits(device, (4, tokens, 256, vocabulary)))
    if device.type == "cuda" and not tiny and torch.cuda.get_device_properties(device).total_memory > 24 << 30:
        yield Check("head, chunk of more than 2^31 logits", lambda: _check_offsets(device, 16384))


def _trl_loss(states, weight, ids, advantages, mask, loss):
    from trl.kernels import ChunkedLogProbFunction

    rows = (states.flatten(0, 1), weight, None, ids.flatten())
    logprobs = ChunkedLogProbFunction.apply(*rows, 1.0, 32768, None, 1.0, ("entropy",))[0]
    return grpo_loss_reference(logprobs.view(ids.shape), advantages, mask, loss)


def _liger(module: str) -> Any:
    """A module of liger-kernel; where that is not installed, what the row of its case says instead of a time."""
    if find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("liger-kernel is not installed (pip install liger-kernel)")
    return import_module(f"liger_kernel.{module}")


def _liger_loss(states, weight, ids, advantages, mask, loss):
    edges = {"epsilon_low": loss.epsilon, "epsilon_high": loss.epsilon_high}
    head = _liger("chunked_loss").LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", **edges)
    return head(states, weight, ids, mask, advantages)[0]


def _head_timing(device, sizes, frozen):
    """Forward and backward of a head of (B, T, H, V) `sizes`, of its states alone where it is frozen."""
    states, weight, *rest = head_inputs(device, *sizes)
    gemm, moved = 2 * math.prod(sizes), 2 * (2 * weight.numel() + 2 * states.numel())
    compiled = torch.compile(linear_grpo_loss_reference)
    losses = {"ours": linear_grpo_loss, "eager": linear_grpo_loss_reference, "compile": compiled, "trl": _trl_loss}
    losses["liger"] = _liger_loss
    leaves = [states, weight.detach() if frozen else weight]
    names = ("ours", "eager", "trl") if frozen else tuple(losses)
    providers = {name: training(losses[name], leaves, *rest, LOSS) for name in names}
    if frozen:
        return Timing(providers, 2 * gemm, moved / 2, goal_ms=31)
    return Timing(providers, 3 * gemm, moved, goal_ms=46)


def _logprob_timing(device, sizes):
    """The head's forward alone."""
    states, weight, ids, _, _ = head_inputs(device, *sizes)
    flat, targets = states.detach().flatten(0, 1), ids.flatten()
    compiled_logprob = torch.compile(linear_logprob_reference)

    def trl_logprob(flat, weight, targets):
        from trl.kernels import ChunkedLogProbFunction

        return ChunkedLogProbFunction.apply(flat, weight, None, targets, 1.0, 32768, None, 1.0, ("entropy",))

    heads = {"ours": linear_logprob, "eager": linear_logprob_reference, "compile": compiled_logprob, "trl": trl_logprob}
    providers = {name: partial(without_grad, head, flat, weight.detach(), targets) for name, head in heads.items()}
    return Timing(providers, 2 * math.prod(sizes), 2 * (weight.numel() + states.numel()), goal_ms=16)


def _logit_loss(logits, ids, advantages, mask, loss):
    """The reference from materialised logits (B, T, V)."""
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return grpo_loss_reference(logprobs.float(), advantages, mask, loss)


def _row_launch(device, rows, tokens, vocabulary):
    """(logits, ids, advantages, mask, a function that launches the row kernel with its constants or others)."""
    logits = torch.randn(rows * tokens, vocabulary, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, vocabulary, (rows, tokens), device=device)
    advantages, mask = torch.randn(rows, device=device), torch.ones(rows, tokens, device=device)
    index = torch.arange(rows * tokens, device=device)
    weights = torch.full((rows,), 1 / (rows * tokens), device=device)
    out, sizes = TokenOutputs(*torch.empty(2, rows * tokens, device=device)), (vocabulary, tokens, LOG2E.value)
    row_constants = linear_grpo._row_constants(logits.dtype, vocabulary, shared_bytes(device))
    constants = {"GRADIENT": True} | LOSS.kernel_flags | row_constants
    arguments = (logits, vocabulary, index, ids, advantages, weights, TokenInputs(), out, *sizes, LOSS.numbers)

    def run(**others):
        launch(linear_grpo._row_kernel, (len(index),), *arguments, **(constants | others))

    return logits, ids, advantages, mask, run


def _logits_timing(device, rows, tokens, vocabulary):
    """The row kernel alone, in place over materialised logits; what it overwrites costs the same to read again."""
    logits, ids, advantages, mask, run = _row_launch(device, rows, tokens, vocabulary)
    providers = {"ours": run}
    leaf = logits.view(rows, tokens, vocabulary).detach().requires_grad_()
    for name, loss in (("eager", _logit_loss), ("compile", torch.compile(_logit_loss))):
        providers[name] = training(loss, [leaf], ids, advantages, mask, LOSS)

    def liger():
        triton_grpo_loss = _liger("transformers.grpo_loss").triton_grpo_loss
        edges = {"eps_low": 0.2, "eps_high": 0.28, "temperature": 1.0, "beta": 0.0, "loss_type": "grpo", "reduce": True}
        loss = triton_grpo_loss(leaf, None, None, ids[:, :-1].contiguous(), advantages, mask[:, :-1].contiguous(), **edges)[0]
        torch.autograd.grad(loss, leaf)

    providers["liger"] = liger
    moved = 2 * logits.numel() * logits.element_size()  # read once, written once
    return Timing(providers, 0, moved, goal_ms=7.7)


# Columns a block (elements of bf16), blocks in flight, warps: other ways to launch the row kernel on a device with 227 KB.
ROW_VARIANTS = [(16384, 3, 16), (16384, 5, 32), (8192, 6, 16), (8192, 10, 16), (8192, 6, 8), (4096, 6, 8)]


def _row_variants(device, rows, tokens, vocabulary):
    logits, *_, run = _row_launch(device, rows, tokens, vocabulary)
    providers = {"ours": run}
    for block, stages, warps in ROW_VARIANTS:
        name = f"{block} x {stages}, {warps} w"
        providers[name] = partial(run, BLOCK=block, STAGES=stages, num_warps=warps, maxnreg=None)
    return Timing(providers, 0, 2 * logits.numel() * logits.element_size())


def _loss_timing(device, shape, backward):
    logprobs, advantages, mask, given = loss_inputs(device, *shape)
    rest = (advantages, mask, replace(LOSS, beta=0.04))
    losses = {"ours": grpo_loss, "eager": grpo_loss_reference, "compile": torch.compile(grpo_loss_reference)}
    leaf = logprobs.requires_grad_()
    moved = logprobs.numel() * (4 * 4 + mask.element_size())  # log-probs, old, reference, gradient, mask
    if backward:
        return Timing({name: training(loss, [leaf], *rest, **given) for name, loss in losses.items()}, 0, moved, graphed=True)
    runs = {name: partial(without_grad, loss, leaf, *rest, **given) for name, loss in losses.items()}
    return Timing(runs, 0, moved, goal_ms=0.006, graphed=True)


def _advantages_timing(device):
    rewards = torch.rand(4096, device=device)
    advantage = {"ours": lambda: group_advantages(rewards, 8), "eager": lambda: group_advantages_reference(rewards, 8)}
    return Timing(advantage, 0, 8 * rewards.numel(), graphed=True)


def timings(device: torch.device, tiny: bool):
    """The goals of the project for the GRPO kernels, each with its peers."""
    sizes = (2, 32, 64, 1000) if tiny else (16, 1024, 2048, VOCABULARY)
    logits, tokens = ((2, 16, 1000), (4, 64)) if tiny else ((32, 1024, VOCABULARY), (32, 1024))
    shape = [sizes[0] * sizes[1], *sizes[2:]]
    yield TimedCase(f"head fwd+bwd {shape}", partial(_head_timing, device, sizes, frozen=False))
    yield TimedCase(f"frozen head fwd+bwd {shape}", partial(_head_timing, device, sizes, frozen=True))
    yield TimedCase(f"head fwd {shape}", partial(_logprob_timing, device, sizes))
    if device.type == "cuda":
        yield TimedCase(f"loss from logits {list(logits)}", partial(_logits_timing, device, *logits))
    yield TimedCase(f"loss fwd+bwd {list(tokens)}", partial(_loss_timing, device, tokens, backward=True))
    yield TimedCase(f"loss fwd {list(tokens)}", partial(_loss_timing, device, tokens, backward=False))
    yield TimedCase("advantages [4096], groups of 8", partial(_advantages_timing, device), peers=False)


def variants(device: torch.device, tiny: bool):
    """The row kernel with other blocks."""
    if device.type == "cuda":
        yield TimedCase(
            "loss from logits, other launches", partial(_row_variants, device, *((2, 16, 1000) if tiny else (32, 1024, VOCABULARY)))
        )
