"""Checks and timings of sampling for bench.gpu: the next token of 64 rows over Qwen2.5-VL's vocabulary.

`ours` is the op, `eager` its specification: PyTorch's passes, and a sort where a mass of tokens is cut off. The least that a case
needs is one read of the logits and an exponential, counted as one FLOP, of each. An error is how far a uniform number lies outside
of the sums before and after its token in float64, or that of its log-probability.
"""

from functools import partial

import torch
from torch import Tensor

from bench.measure import Check, TimedCase, Timing
from kernels.sample import sample, sample_reference, truncate

V = 151936
SANITIZED = ("sample, whole", "sample, cut off")
ASKED: dict[str, dict] = {
    "whole": {},
    "greedy": {"temperature": 0.0},
    "cut off": {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "by mass": {"top_p": 0.9},
}


def _inputs(device: torch.device, tiny: bool, rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(rows, 1003 if tiny else V, device=device, generator=generator)
    return logits, torch.rand(rows, device=device, generator=generator)


def _check(device, tiny, asked):
    logits, uniform = _inputs(device, tiny)
    ids, logprobs = sample(logits, uniform, **asked)
    if asked.get("temperature") == 0:
        exact_ids, exact = sample_reference(logits.double(), uniform, **asked)
        return max((logprobs - exact).abs().max().item(), float(not torch.equal(ids, exact_ids))), 1e-5
    cut = truncate(logits.double() / asked.get("temperature", 1.0), *(asked.get(n, d) for n, d in (("top_k", 0), ("top_p", 1.0))))
    exact = truncate(cut, min_p=asked.get("min_p", 0.0)).log_softmax(-1)
    after, chosen = (x.gather(1, ids[:, None])[:, 0] for x in (exact.exp().cumsum(-1), exact))
    outside = torch.maximum(after - chosen.exp() - uniform, uniform - after).max().item()
    return max(outside, (logprobs - chosen).abs().max().item()), 1e-5


def checks(device: torch.device, tiny: bool):
    """Of every way to sample, against float64."""
    for name, asked in ASKED.items():
        yield Check(f"sample, {name}", partial(_check, device, tiny, asked))


def _timing(device, tiny, asked):
    logits, uniform = _inputs(device, tiny)
    runs = {"ours": partial(sample, logits, uniform, **asked), "eager": partial(sample_reference, logits, uniform, **asked)}
    return Timing(runs, logits.numel(), 4 * logits.numel(), graphed=True)


def timings(device: torch.device, tiny: bool):
    """64 rows, the whole distribution and what is left of it."""
    for name, asked in ASKED.items():
        yield TimedCase(f"sample [64, {V}], {name}", partial(_timing, device, tiny, asked), peers=False)
