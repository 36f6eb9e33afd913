"""What the engine asks of a model. `models/` implements it; a recipe brings the two together.

Letters: B prompts, G answers a prompt, N = B*G, T answer tokens, H hidden size, V vocabulary.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn


class PromptBatch(Protocol):
    """B encoded prompts with their images."""

    input_ids: torch.Tensor

    def __len__(self) -> int: ...

    def select(self, rows: list[int]) -> "PromptBatch": ...


class DecodingState(Protocol):
    """N answers being decoded: `step(token_ids (N,)) -> logits (N, V)`, `select(rows)` drops all other rows."""

    def step(self, token_ids: torch.Tensor) -> torch.Tensor: ...

    def select(self, rows: torch.Tensor) -> None: ...


class Policy(Protocol):
    """A vision-language model that can be sampled from and trained.

    `model` is the (PEFT or Hugging Face) module that is optimised; `processor` decodes ids to texts and is saved with checkpoints.
    `model(**policy.answer_inputs(batch, answer_ids), head=f)` returns `f(hidden (N, T, H), weight (V, H))`.
    """

    model: nn.Module
    processor: Any
    device: torch.device
    eos_token_ids: list[int]
    pad_token_id: int

    def encode(self, prompts: list[list[dict]], images: list[list], image_keys: list[str | None] | None = None) -> PromptBatch: ...

    def prefill(self, batch: PromptBatch, num_answers: int, max_new_tokens: int) -> tuple[DecodingState, torch.Tensor]: ...

    def answer_inputs(self, batch: PromptBatch, answer_ids: torch.Tensor) -> dict: ...

    def reference(self) -> "Policy": ...

    def as_reference(self) -> AbstractContextManager: ...
