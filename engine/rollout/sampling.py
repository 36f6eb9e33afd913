"""From logits to a token: penalty, temperature and truncation as in transformers' generation, drawn with given randomness.

A token is the inverse of the cumulative distribution at one uniform number. The numbers come with the prompt, not with the batch,
so what is sampled does not depend on how prompts are batched, spread over processes or dropped once finished.

Letters: N rows, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingParams:
    """Temperature 0 is greedy. `top_p` 1, `top_k` 0, `min_p` None and `repetition_penalty` 1 leave the distribution whole.

    `repetition_penalty` None: the policy's own.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float | None = None


GREEDY = SamplingParams(temperature=0.0)


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (N, V) of `seen` tokens (N, V), divided by `penalty` where positive, else multiplied (CTRL, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def cumulative_sum(x: torch.Tensor) -> torch.Tensor:
    """Of each row (N, V). On CUDA torch's own sums differ from run to run, and it refuses them where determinism is asked for
    (`--full_determinism`): there each pass adds what lies twice as far before, V rounded up to a power of two in all.
    """
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(-1)
    distance = 1
    while distance < x.shape[-1]:
        x = torch.cat([x[..., :distance], x[..., distance:] + x[..., :-distance]], -1)
        distance *= 2
    return x


def truncate(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits (N, V) with -inf outside top-k, then top-p, then min-p, each of what the one before left."""
    if params.top_k > 0:
        threshold = logits.topk(min(params.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1)  # ascending: the smallest tokens whose mass stays within 1 - top_p go
        drop = cumulative_sum(ordered.softmax(-1)) <= 1 - params.top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    if params.min_p is not None:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return logits


def choose(
    logits: torch.Tensor, params: SamplingParams, uniform: torch.Tensor, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) float32 and `uniform` (N,) in [0, 1) -> (token_ids (N,), logprobs (N,)) under the distribution drawn from.

    Greedy log-probs are those of temperature 1.
    """
    if params.repetition_penalty is not None and seen is not None:
        logits = penalise_repetition(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        best, token_ids = logits.max(-1)
        return token_ids, best - logits.logsumexp(-1)
    logits = truncate(logits / params.temperature if params.temperature != 1 else logits, params)
    highest, mode = logits.max(-1, keepdim=True)
    weights = (logits - highest).exp_()
    cumulative = cumulative_sum(weights)
    total = cumulative[:, -1:]
    token_ids = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    token_ids = torch.where(token_ids < logits.shape[-1], token_ids, mode)  # uniform * total may round up to total
    logprobs = (logits.gather(1, token_ids) - highest - total.log()).squeeze(1)
    return token_ids.squeeze(1), logprobs
