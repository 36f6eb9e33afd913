"""Tokens that a language model did not have: their rows of its embedding and of its head, beside its own, which stay as they are.

Uni-MedVLM adds five. They come after the tokenizer's own, whether or not the model has rows to spare there. Only these rows learn,
and no optimizer keeps states for a whole vocabulary.

Letters: V rows of the model's own, W of both together, K new ones, H hidden size.
"""

import torch
from torch import Tensor, nn

SEG, IMAGE, REGION, REGION_END, REGION_FEATURE = NEW_TOKENS = ("<SEG>", "<image>", "<region>", "</region>", "<region_feature>")


class TokenRows(nn.Module):
    """The rows of the K tokens from id `start` on."""

    def __init__(self, start: int, embedding: Tensor, head: Tensor):
        """embedding and head [K, H]: their first values."""
        super().__init__()
        self.start = start
        self.embedding = nn.Parameter(embedding.detach().clone())
        self.head = nn.Parameter(head.detach().clone())

    @classmethod
    def mean_of(cls, start: int, embedding: Tensor, head: Tensor, count: int = len(NEW_TOKENS)) -> "TokenRows":
        """Rows that begin as the mean of the model's [V, H], the embedding's of the embedding and the head's of the head."""
        own = slice(None, min(start, len(embedding)))
        means = (weight.detach()[own].float().mean(0).to(weight.dtype).expand(count, -1) for weight in (embedding, head))
        return cls(start, *means)

    def embed(self, ids: Tensor, own: nn.Module) -> Tensor:
        """ids [...] -> [..., H], of `own`, the model's embedding, where they are the model's."""
        new = (ids >= self.start) & (ids < self.start + len(self.embedding))
        rows = self.embedding[(ids - self.start).clamp(0, len(self.embedding) - 1)]
        embedded = own(ids.masked_fill(new, 0))
        return torch.where(new[..., None], rows.to(embedded.dtype), embedded)

    def weight(self, own: Tensor) -> Tensor:
        """The head's weight [V, H] with these rows in it: [W, H]."""
        return torch.cat([own[: self.start], self.head.to(own.dtype), own[self.start + len(self.head) :]])

    def logits(self, hidden: Tensor, own: Tensor) -> Tensor:
        """hidden [N, H] -> [N, W]: what `weight` would give, without a copy of the head."""
        logits, new = hidden @ own.T, hidden @ self.head.to(hidden.dtype).T
        return torch.cat([logits[:, : self.start], new, logits[:, self.start + len(self.head) :]], 1)
