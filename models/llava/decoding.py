"""Answers of a LLaVA, decoded one token a step over transformers' cache.

Letters: N answers, P padded prompt tokens, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration


class LlavaDecoding:
    """`step(token_ids)` appends a token to every answer and returns the next logits; `select(rows)` drops answers.

    `cache` holds the prompts, `attention_mask` (N, P) says which of their tokens are real. They may be padded on either side: in
    the cache a new token follows the padding, while its position counts real tokens only.
    """

    def __init__(self, model: LlavaForConditionalGeneration, cache: DynamicCache, attention_mask: Tensor):
        self.model, self.cache, self.attention_mask = model, cache, attention_mask

    def step(self, token_ids: Tensor) -> Tensor:
        """token_ids (N,) -> logits of the token after them, (N, V) float32."""
        position = self.attention_mask.sum(1, keepdim=True)
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(position)], 1)
        out = self.model.model(
            input_ids=token_ids[:, None],
            attention_mask=self.attention_mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.model.lm_head(out.last_hidden_state[:, -1]).float()

    def select(self, rows: Tensor) -> None:
        """Keep these answers (M,) only."""
        self.attention_mask = self.attention_mask[rows]
        self.cache.batch_select_indices(rows)


def greedy_ids(decoding: LlavaDecoding, logits: Tensor, end_id: int, max_new_tokens: int) -> list[list[int]]:
    """The likeliest token each time, from `logits` (N, V) of the first one on -> each answer's tokens before its end token."""
    answers: list[list[int]] = [[] for _ in logits]
    done = [False] * len(answers)
    for step in range(max_new_tokens):
        ids = logits.argmax(-1)
        for i, token in enumerate(ids.tolist()):
            done[i] = done[i] or token == end_id
            if not done[i]:
                answers[i].append(token)
        if all(done) or step + 1 == max_new_tokens:
            break
        logits = decoding.step(ids)
    return answers
