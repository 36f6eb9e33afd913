"""Checks and timings of attention over shared prompts for bench.gpu: training rows, and a decode step.

The shape is that of Qwen2.5-VL 3B: 16 query and 2 key heads of d = 128; prompts of P = 700 tokens, G = 8 answers of T = 256.
`ours` reads a prompt's keys in place; `eager` is PyTorch's SDPA over rows that repeat them: for every answer, and for every query
head, as transformers does where there is a mask. Peers are the other providers of `--attention`, where they are installed.
The least that a case needs:

    FLOPs    4 h d a pair of tokens of which one sees the other: P P / 2 + G T (P + T / 2) pairs a prompt. The backward 10 h d.
             A decode step: 4 h d a row and key
    bytes    two an element. Forward: q, k, v and o once. Backward: those and do once more, and the gradients once.
             A decode step: the prompts' keys and values once, those of the answers once
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Check, TimedCase, Timing, against_eager, training, with_gradients, without_grad
from kernels.prefix_attention import prefix_attention, prefix_attention_reference
from kernels.prefix_decode import prefix_decode, prefix_decode_reference
from kernels.prefix_providers import PROVIDERS, prefix_attention_by, unusable

H, K, D = 16, 2, 128
SANITIZED = ("prefix attention (77, 3", "prefix decode (77, 3")
# P, G, T, query and key heads, head size
ROWS = [(77, 3, 11, 16, 2, 128), (130, 8, 40, 14, 2, 64), (64, 1, 65, 4, 4, 80), (200, 4, 1, 12, 2, 96)]


def _states(device: torch.device, prompts: int, heads: tuple[int, ...], tokens: int, d: int) -> list[Tensor]:
    """One tensor [prompts, heads, tokens, d] each, as a model has them: views of [prompts, tokens, heads, d], bfloat16 values."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(prompts, tokens, number, d) for number in heads]
    return [torch.randn(shape, device=device, generator=generator).bfloat16().transpose(1, 2) for shape in shapes]


def _check_rows(device, tiny, P, G, T, h, k, d):
    states = _states(device, 3, (h, k, k), P + G * T, d)
    rest = (P, G, torch.tensor([0, 5, P - 1], device=device))
    truth = with_gradients(prefix_attention_reference, states, torch.float64, *rest)
    ours, eager = (with_gradients(f, states, torch.bfloat16, *rest) for f in (prefix_attention, prefix_attention_reference))
    return against_eager(ours, eager, truth)


def decode_inputs(device: torch.device, P: int, G: int, T: int, h: int, k: int, d: int, prompts: int = 3) -> list[Tensor]:
    """What `prefix_decode` takes in the middle of a rollout: bfloat16, rows of one prompt together, the first with half of G."""
    rows = torch.tensor([max(1, G // 2), *[G] * (prompts - 1)])
    N = int(rows.sum())
    [query] = _states(device, N, (h,), 1, d)
    prompt, own = (_states(device, number, (k, k), tokens, d) for number, tokens in ((prompts, P), (N, T)))
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), rows.cumsum(0)]).to(device)
    start = torch.arange(prompts, device=device) * 3
    return [query, *prompt, *own, bounds, start, torch.tensor([T // 2], device=device)]


def _check_decode(device, tiny, *sizes):
    tensors = decode_inputs(device, *sizes)
    exact = prefix_decode_reference(*(x.double() if x.is_floating_point() else x for x in tensors))
    ours, eager = (function(*tensors).double() for function in (prefix_decode, prefix_decode_reference))
    return against_eager([ours], [eager], [exact])


def checks(device: torch.device, tiny: bool):
    """Against the references in float64; eager is the references in bfloat16."""
    for sizes in ROWS:
        yield Check(f"prefix attention {sizes}", partial(_check_rows, device, tiny, *sizes))
    for sizes in ROWS:
        yield Check(f"prefix decode {sizes}", partial(_check_decode, device, tiny, *sizes))


def _repeated(query: Tensor, key: Tensor, value: Tensor, P: int, G: int, mask: Tensor) -> Tensor:
    """SDPA over rows `[prompt, answer]`, the prompt's keys copied to every answer and query head."""
    B, h, S, _ = query.shape
    T, (key, value) = (S - P) // G, (x.repeat_interleave(h // x.shape[1], 1) for x in (key, value))
    prompt = F.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P], is_causal=True)

    def own(x: Tensor) -> Tensor:
        return x[:, :, P:].unflatten(2, (G, T)).transpose(1, 2).flatten(0, 1)

    def with_prompt(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :P].repeat_interleave(G, 0), own(x)], 2)

    answers = F.scaled_dot_product_attention(own(query), with_prompt(key), with_prompt(value), attn_mask=mask)
    answers = answers.unflatten(0, (B, G)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return torch.cat([prompt.transpose(1, 2), answers], 1)


def _row_timing(device, tiny, prompts, backward):
    P, G, T = (32, 2, 8) if tiny else (700, 8, 256)
    leaves = [x.requires_grad_() for x in _states(device, prompts, (H, K, K), P + G * T, D)]
    mask = torch.ones(T, P + T, dtype=torch.bool, device=device).tril(P)
    start = torch.zeros(prompts, dtype=torch.int64, device=device)  # kept by a model too, for all of its layers
    ways = {"ours": lambda *x: prefix_attention(*x, P, G), "eager": lambda *x: _repeated(*x, P, G, mask)}
    for provider in PROVIDERS[1:]:
        if unusable(provider, device) is None:
            ways[provider] = partial(lambda provider, *x: prefix_attention_by(provider, *x, P, G, start), provider)
    pairs, elements = prompts * (P * P / 2 + G * T * (P + T / 2)), prompts * (P + G * T) * D
    if not backward:
        runs = {name: partial(without_grad, way, *leaves) for name, way in ways.items()}
        return Timing(runs, 4 * H * D * pairs, 2 * elements * (2 * H + 2 * K))
    seed = torch.ones_like(without_grad(ways["ours"], *leaves))
    runs = {name: training(way, leaves, grad_output=seed) for name, way in ways.items()}
    return Timing(runs, 14 * H * D * pairs, 2 * elements * (7 * H / 2 + 3 * K) * 2)


def _decode_timing(device, tiny):
    P, G, T, prompts = (64, 2, 16, 2) if tiny else (700, 8, 256, 8)
    tensors = decode_inputs(device, P, G, T, H, K, D, prompts)
    query, prompt_key, prompt_value, own_key, own_value, bounds, start, _ = tensors
    rows, room = torch.arange(prompts, device=device).repeat_interleave(bounds.diff()), T // 2 + 1
    pairs = ((prompt_key, own_key), (prompt_value, own_value))
    key, value = (torch.cat([x[rows], own[:, :, :room]], 2) for x, own in pairs)
    seen = (torch.arange(P + room, device=device) >= start[rows, None])[:, None, None]

    def expanded():
        heads = [x.repeat_interleave(H // K, 1) for x in (key, value)]
        return F.scaled_dot_product_attention(query, *heads, attn_mask=seen)

    runs = {"ours": partial(prefix_decode, *tensors, most_rows=G), "eager": expanded}
    least = 4 * K * D * (prompts * P + len(rows) * room)
    return Timing(runs, 4 * H * D * len(rows) * (P + room), least, graphed=True)


def timings(device: torch.device, tiny: bool):
    """A layer's attention: rows of one and of eight prompts, forward and with the backward, and a step of 60 answers."""
    for prompts in (1, 8):
        yield TimedCase(f"prefix attention fwd, B={prompts}", partial(_row_timing, device, tiny, prompts, False))
        yield TimedCase(f"prefix attention fwd+bwd, B={prompts}", partial(_row_timing, device, tiny, prompts, True))
    yield TimedCase("prefix decode of a layer", partial(_decode_timing, device, tiny), peers=False)
