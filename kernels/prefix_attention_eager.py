"""Shared-prefix attention where no Triton runs: the parts of prefix_attention.py's sums, each one dense or causal call.

Of each prompt: the prompt over itself (causal), all answers over the prompt, each answer over itself (causal), the last two merged.
Padding is left out by where a prompt starts. Tensors are seen as [k, share, S, ...]: query heads by the key head that they share,
keys and values with a stride of 0 in the place of `share`. Letters: see prefix_attention.py.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from kernels.partial_attention import attend, attend_backward, merge


class _Part(NamedTuple):
    """Which rows attend to which keys, as views of [k, share, S, ...]; `more`: these rows have attended to other keys before."""

    rows: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    causal: bool
    more: bool = False


def _parts(start: int, P: int, G: int, S: int, k: int, share: int) -> Iterator[_Part]:
    def prompt(x: Tensor) -> Tensor:
        return x[:, :, start:P]

    def own(x: Tensor) -> Tensor:  # [heads, S, ...] -> [G, heads, T, ...]
        return x[:, P:].unflatten(1, (G, -1)).transpose(0, 1)

    yield _Part(prompt, prompt, causal=True)
    if S == P:
        return
    yield _Part(lambda x: x[:, :, P:], prompt, causal=False)
    # Four dimensions are all that a call has: the key heads are one of them where each has one query head, else a loop.
    if share == 1:
        yield _Part(lambda x: own(x[:, 0]), lambda x: own(x[:, 0]), causal=True, more=True)
        return
    for head in range(k):
        answers = functools.partial(lambda head, x: own(x[head]), head)
        yield _Part(answers, answers, causal=True, more=True)


def _by_key_head(x: Tensor, k: int) -> Tensor:
    """[k, share, S, ...] of x [h or k, S, ...], a view."""
    return x.unflatten(0, (k, -1))


def _shared(x: Tensor, share: int) -> Tensor:
    """[k, share, S, d] of x [k, S, d], of stride 0 over the query heads that share a key head."""
    return x[:, None].expand(-1, share, -1, -1)


def attend_by_parts(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, P: int, G: int, scale: float, output: Tensor, lse: Tensor
) -> None:
    """Fill output [B, S, h, d] and lse [B, h, S]; rows that see nothing keep what they have."""
    (_, h, S, _), k = query.shape, key.shape[1]
    for b, start in enumerate(starts.tolist()):
        q, o, sums = (_by_key_head(x, k) for x in (query[b], output[b].transpose(0, 1), lse[b]))
        shared_k, shared_v = _shared(key[b], h // k), _shared(value[b], h // k)
        for rows, keys, causal, more in _parts(start, P, G, S, k, h // k):
            result = attend(rows(q), keys(shared_k), keys(shared_v), scale, causal)
            if more:
                result = merge(rows(o), rows(sums), *result)
            rows(o).copy_(result[0])
            rows(sums).copy_(result[1])


def gradients_by_parts(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    output: Tensor,
    lse: Tensor,
    P: int,
    G: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [B, S, h, d], dk and dv [B, S, k, d]) of grad [B, S, h, d]."""
    (B, h, S, d), k = query.shape, key.shape[1]
    gradients = grad_query, grad_key, grad_value = [query.new_zeros(B, S, heads, d) for heads in (h, k, k)]
    for b, start in enumerate(starts.tolist()):
        g, o, dq, dk, dv = (_by_key_head(x[b].transpose(0, 1), k) for x in (grad, output, *gradients))
        q, sums = _by_key_head(query[b], k), _by_key_head(lse[b], k)
        shared_k, shared_v = _shared(key[b], h // k), _shared(value[b], h // k)
        for rows, keys, causal, _ in _parts(start, P, G, S, k, h // k):
            to_query, *to_keys = attend_backward(
                rows(g), rows(q), keys(shared_k), keys(shared_v), rows(o), rows(sums), scale, causal
            )
            rows(dq).add_(to_query)
            for whole, part in zip((dk, dv), to_keys, strict=True):
                total = keys(whole)
                total.add_(part if part.shape == total.shape else part.sum(1, keepdim=True))
    return grad_query, grad_key, grad_value
