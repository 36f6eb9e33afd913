"""Rollouts: G sampled answers to each prompt, from one vision pass and one prefill a prompt.

Letters: B prompts, G answers a prompt, N = B*G, T tokens of the longest answer, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from engine.rollout.policy import Policy, Processor, PromptBatch
from engine.rollout.sampling import SamplingParams, choose

TOKENS_UNREAD = 8  # between two reads of who has ended, where reading means to wait for the device


@dataclass
class Rollout:
    """Answers to a prompt batch; rows of one prompt lie together.

    completion_ids, completion_mask, logprobs (N, T): mask is 1 up to and including the end token; logprobs are those of the
    distribution sampled from, 0 where masked. truncated (N,): no end token within the limit.
    """

    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    logprobs: torch.Tensor
    truncated: torch.Tensor

    @classmethod
    def join(cls, parts: "list[Rollout]", pad_token_id: int) -> "Rollout":
        """The answers of several prompt batches, one after the other."""
        if len(parts) == 1:
            return parts[0]
        length = max(part.completion_ids.shape[1] for part in parts)

        def joined(name: str, value: int = 0) -> torch.Tensor:
            tensors = [getattr(part, name) for part in parts]
            return torch.cat([pad(x, (0, length - x.shape[1]), value=value) for x in tensors])

        ids = joined("completion_ids", pad_token_id)
        return cls(ids, joined("completion_mask"), joined("logprobs"), torch.cat([part.truncated for part in parts]))

    def texts(self, processor: Processor) -> list[str]:
        """The answers as text, special tokens removed."""
        rows = zip(self.completion_ids.tolist(), self.completion_mask.sum(1).tolist(), strict=True)
        return processor.decode([ids[:length] for ids, length in rows])


def uniform_noise(seeds: list[int], num_generations: int, max_new_tokens: int) -> torch.Tensor:
    """Uniform numbers (len(seeds) * G, max_new_tokens) in [0, 1), one stream for each prompt's seed."""
    streams = [torch.rand(num_generations, max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(streams)


@torch.no_grad()
def rollout(
    policy: Policy,
    batch: PromptBatch,
    sampling: SamplingParams,
    *,
    num_generations: int,
    max_new_tokens: int,
    seeds: list[int] | None = None,
) -> Rollout:
    """Sample `num_generations` answers to each of B prompts. `seeds` (one a prompt, default 0..B-1) decide the randomness.

    Who has ended is read at every token on a CPU, where that costs nothing and a row more costs time; elsewhere at every eighth,
    and the host waits for nothing between. What is drawn after an end token is masked, so the answers are the same.
    """
    if sampling.repetition_penalty is None:
        sampling = replace(sampling, repetition_penalty=policy.repetition_penalty)
    noise = uniform_noise(seeds or list(range(len(batch))), num_generations, max_new_tokens).to(policy.device)
    rows = noise.shape[0]
    ends = torch.tensor(policy.eos_token_ids, device=policy.device)
    ids = torch.full((rows, max_new_tokens), policy.pad_token_id, device=policy.device)
    logprobs = torch.zeros(rows, max_new_tokens, device=policy.device)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=policy.device)

    state, logits = policy.prefill(batch, num_generations, max_new_tokens)
    seen = _seen_tokens(batch, num_generations, logits) if sampling.repetition_penalty != 1 else None
    rows_left = torch.arange(rows, device=policy.device)  # which answer each row of `logits` belongs to
    open_rows = torch.ones(rows, dtype=torch.bool, device=policy.device)
    unread = _tokens_unread(policy.device)
    for t in range(max_new_tokens):
        tokens, token_logprobs = choose(logits, sampling, noise[rows_left, t], seen)
        ids[rows_left, t] = torch.where(open_rows, tokens, policy.pad_token_id)
        logprobs[rows_left, t] = token_logprobs * open_rows
        mask[rows_left, t] = open_rows.long()
        open_rows = open_rows & ~torch.isin(tokens, ends)
        if seen is not None:
            seen[torch.arange(len(tokens), device=tokens.device), tokens] = True

        if t + 1 == max_new_tokens:
            break
        if (t + 1) % unread == 0:
            num_open = int(open_rows.sum())
            if num_open == 0:
                break
            kept = _rows_to_keep(len(open_rows), num_open, static=policy.device.type == "cuda")
            if kept < len(open_rows):
                order = open_rows.int().argsort(descending=True, stable=True)[:kept].sort().values
                rows_left, open_rows, tokens = rows_left[order], open_rows[order], tokens[order]
                seen = None if seen is None else seen[order]
                state.select(order)
        logits = state.step(tokens)

    length = int(mask.sum(1).max())
    truncated = torch.zeros(rows, dtype=torch.bool, device=policy.device)
    truncated[rows_left] = open_rows
    return Rollout(ids[:, :length], mask[:, :length], logprobs[:, :length], truncated)


def _tokens_unread(device: torch.device) -> int:
    """How many tokens are drawn between two reads of who has ended."""
    return 1 if device.type == "cpu" else TOKENS_UNREAD


def _rows_to_keep(rows: int, num_open: int, *, static: bool) -> int:
    """How many rows to go on with. Dropping copies the cache, so it waits until an eighth is finished; static shapes only halve."""
    if not static:
        return num_open if num_open <= 0.875 * rows else rows
    while rows % 2 == 0 and rows // 2 >= num_open:
        rows //= 2
    return rows


def _seen_tokens(batch: PromptBatch, num_generations: int, logits: torch.Tensor) -> torch.Tensor:
    """The tokens of each answer's prompt (N, V); padding is none of them, though its id may be a token's."""
    counts = torch.zeros(len(batch), logits.shape[-1], dtype=torch.long, device=logits.device)
    counts.scatter_add_(1, batch.input_ids, (batch.attention_mask != 0).long())
    return (counts > 0).repeat_interleave(num_generations, 0)
