"""How answers are sampled: the settings, under the names of transformers' generation, whose processors they equal.

A token is the inverse of the cumulative distribution at one uniform number. The numbers come with the prompt, not with the batch,
so what is sampled does not depend on how prompts are batched, spread over processes or dropped once finished.
"""

from dataclasses import dataclass

import torch

from kernels.sample import sample


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


def choose(
    logits: torch.Tensor, params: SamplingParams, uniform: torch.Tensor, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) float32 and `uniform` (N,) in [0, 1) -> (token_ids (N,), logprobs (N,)) under the distribution drawn from.

    Greedy log-probs are those of temperature 1.
    """
    return sample(
        logits,
        uniform,
        seen,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p or 0.0,
        repetition_penalty=params.repetition_penalty or 1.0,
    )
