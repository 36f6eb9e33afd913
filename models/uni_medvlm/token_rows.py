"""Rows of new tokens, trainable while the embeddings and the head of the language model stay frozen as they are.

    ids 0 .. first - 1            the language model's own tokens: rows of its embedding and its head, left as they are
    ids first .. first + n - 1    new tokens such as <SEG>: rows kept here, in float32 whatever the model is in

A new token begins as the mean of the rows that were there: of the embedding's for its input, of the head's for its logit. (The
published code gives the head the mean of the embedding's.) Rows from `first` on that the language model has without tokens of its
own, as padded vocabularies do, stand for nothing: they are neither read nor scored.

Letters: V rows of the whole vocabulary, H hidden size, n new tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenRows(nn.Module):
    """`first`: the id of the first new token; input_rows and head_rows [n, H], what its rows begin as."""

    def __init__(self, first: int, input_rows: Tensor, head_rows: Tensor):
        super().__init__()
        if input_rows.shape != head_rows.shape:
            raise ValueError(f"input rows are {tuple(input_rows.shape)}, head rows {tuple(head_rows.shape)}: expected the same")
        self.first = first
        self.input = nn.Parameter(input_rows.detach().float().clone())
        self.head = nn.Parameter(head_rows.detach().float().clone())
        self._whole: Tensor | None = None  # [V, H], a frozen head and room for the new rows
        self._made_of: tuple[object, ...] = ()  # of the head that is in it

    def embed(self, input_ids: Tensor, embedding: nn.Module) -> Tensor:
        """Embeddings [..., H] of ids [...] below V, in the type of `embedding`, the language model's own.

        The new rows have a gradient, of zeros, also where no new token is there, so that processes with different rows agree.
        """
        own = embedding(input_ids.clamp(max=self.first - 1))
        new = F.embedding((input_ids - self.first).clamp(min=0), self.input).to(own.dtype)
        return torch.where((input_ids < self.first)[..., None], own, new)

    def head_weight(self, weight: Tensor) -> Tensor:
        """[V, H]: the head of the whole vocabulary, from the language model's own, in its type.

        The kernels read it in one piece. Of a frozen head that piece is made once and lent to every call, which writes the n new
        rows into it and nothing else; a head that is trained is put together anew.
        """
        if weight.requires_grad:
            return torch.cat([weight[: self.first], self.head.to(weight.dtype)])
        made_of = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._whole is None or self._made_of != made_of:
            self._whole = torch.cat([weight[: self.first], weight.new_empty(self.head.shape)])
            self._made_of = made_of
        # Unseen by autograd: two forward passes before a backward write the same values, under what the first has kept.
        self._whole.data[self.first :].copy_(self.head.detach())
        return _WithRows.apply(self.head, self._whole)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [N, H] -> [N, V]: what `head_weight` would give, without a copy of the head."""
        new = hidden @ self.head.to(hidden.dtype).T
        return torch.cat([(hidden @ weight.to(hidden.dtype).T)[:, : self.first], new], 1)


class _WithRows(torch.autograd.Function):
    """The whole [V, H], whose last rows are `rows`: theirs is the end of its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, whole: Tensor) -> Tensor:
        ctx.num_rows, ctx.dtype = len(rows), rows.dtype
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[-ctx.num_rows :].to(ctx.dtype), None


def averaged_rows(embedding: Tensor, head: Tensor, first: int, num_tokens: int) -> TokenRows:
    """Rows for `num_tokens` tokens after the `first` that a language model has: each the mean of those of its kind.

    embedding and head [>= first, H] are the language model's weights. Raises ValueError where they have fewer rows.
    """
    if min(len(embedding), len(head)) < first:
        raise ValueError(f"the first new token is {first}, and the language model has {min(len(embedding), len(head))} rows")
    means = (weight[:first].detach().float().mean(0, keepdim=True).expand(num_tokens, -1) for weight in (embedding, head))
    return TokenRows(first, *means)
