"""`prefix_attention` as other packages compute it: PyTorch's SDPA, flash-attn and xformers, for `--attention` and to compare with.

    sdpa                one call with a mask [B, 1, S, S]: any device and dtype, S^2 bytes a prompt, the heads of GQA not repeated
    flash, xformers     two variable-length calls over the rows as they lie, [B S, heads, d], whose segments are, of each row,
        own      [padding] [prompt] [answer_1] .. [answer_G]    each over itself, causal
        prompt   the answers, as one segment, over the prompt   not causal; merged with their own part:
                 l = log(exp l_own + exp l_prompt)     o = exp(l_own - l) o_own + exp(l_prompt - l) o_prompt

The backward of each call takes the merged o and l, so that its gradients are those of its part of the sum and add up, as in ring
attention (arXiv:2310.01889). Nothing is padded, repeated or packed; what padding attends to is dropped. Equation, shapes and
letters: prefix_attention.py, whose op these stand in for.

flash-attn 2.8 and xformers 0.0.35 run on CUDA and in half types only; neither is needed to import this file.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.weak import WeakIdKeyDictionary

from kernels.partial_attention import merge
from kernels.prefix_attention import check_rows, in_rows, prefix_attention, seen_keys

PACKAGES = {"flash": "flash_attn", "xformers": "xformers"}
PROVIDERS = ("prefix", "sdpa", *PACKAGES)  # `prefix`: kernels/prefix_attention.py


class Segments(NamedTuple):
    """Tokens queries[i] to queries[i + 1] attend to keys[i] to keys[i + 1]; both int32 [segments + 1], and the longest of each."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


def own_segments(starts: Tensor, P: int, G: int, S: int) -> Segments:
    """Padding, prompt and answers of each row, over themselves."""
    T = (S - P) // max(1, G)
    lengths = torch.stack([starts, P - starts, *[torch.full_like(starts, T)] * G], 1)
    ends = _ends(lengths)
    return Segments(ends, ends, max(P, T), max(P, T))


def prompt_segments(starts: Tensor, P: int, G: int, S: int) -> Segments:
    """The answers of each row over its prompt. Rows and keys are walked in order, so the prompt's own tokens come between: they see
    the padding, of which nothing is kept, and the answers' keys are seen by no row."""
    answers, none = torch.full_like(starts, S - P), torch.zeros_like(starts)
    rows = torch.stack([none + P, answers, none], 1)
    keys = torch.stack([starts, P - starts, answers], 1)
    return Segments(_ends(rows), _ends(keys), max(P, S - P), max(P, S - P))


def _ends(lengths: Tensor) -> Tensor:
    return F.pad(lengths.flatten().cumsum(0), (1, 0)).int()


class Flash:
    """flash-attn: query [N, h, d], key and value [M, k, d] -> o [N, h, d] and l [h, N]."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, part: Segments, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """Of these segments."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as attend

        output, lse, *_ = attend(q, k, v, *part, 0.0, scale, causal)
        return output, lse

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Segments, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of a part, with the o and l of the whole."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward as differentiate

        gradients = [torch.empty_like(x) for x in (q, k, v)]
        same_sums = torch.are_deterministic_algorithms_enabled()
        differentiate(grad, q, k, v, o, lse, *gradients, *part, 0.0, scale, causal, -1, -1, 0.0, None, same_sums)
        return gradients[0], gradients[1], gradients[2]


class Xformers:
    """xformers: the same, of query heads by the key head that they share, [1, N, k, h / k, d]; the keys' stride is 0 there."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, part: Segments, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """Of these segments."""
        from xformers.ops import fmha

        states = Xformers._by_key_head(q, k, v)
        output, lse = fmha.memory_efficient_attention_partial(
            *states, attn_bias=Xformers._bias(part, causal), scale=scale, op=fmha.flash.FwOp
        )
        return output[0].flatten(1, 2), lse[0].flatten(0, 1)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Segments, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of a part, with the o and l of the whole."""
        from xformers.ops import fmha

        (grad, o), states = (Xformers._grouped(x, k.shape[1]) for x in (grad, o)), Xformers._by_key_head(q, k, v)
        sums, bias = lse.unflatten(0, (k.shape[1], -1))[None], Xformers._bias(part, causal)
        dq, dk, dv = fmha.memory_efficient_attention_backward(
            grad, o, sums, *states, attn_bias=bias, scale=scale, op=fmha.flash.BwOp
        )
        return dq[0].flatten(1, 2), dk[0].sum(2), dv[0].sum(2)

    @staticmethod
    def _by_key_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped = Xformers._grouped(q, k.shape[1])
        key, value = (x[None, :, :, None].expand(-1, -1, -1, grouped.shape[3], -1) for x in (k, v))
        return grouped, key, value

    @staticmethod
    def _grouped(x: Tensor, key_heads: int) -> Tensor:
        return x.unflatten(1, (key_heads, -1))[None]

    @staticmethod
    def _bias(part: Segments, causal: bool) -> Any:
        """It wants the lengths on the host, which are read once for all layers of a batch."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

        kind = BlockDiagonalCausalMask if causal else BlockDiagonalMask
        if part.queries not in _BIASES:
            lengths = [ends.diff().tolist() for ends in (part.queries, part.keys)]
            _BIASES[part.queries] = kind.from_seqlens(*lengths, device=part.queries.device)
        return _BIASES[part.queries]


BY_NAME: dict[str, type[Flash] | type[Xformers]] = {"flash": Flash, "xformers": Xformers}
_BIASES, _PARTS = WeakIdKeyDictionary(), WeakIdKeyDictionary()


def _parts(starts: Tensor, P: int, G: int, S: int) -> tuple[Segments, Segments]:
    """Made once for all layers of a batch, which hand over the same `starts`."""
    sizes, parts = _PARTS.get(starts, (None, None))
    if sizes != (P, G, S):
        parts = own_segments(starts, P, G, S), prompt_segments(starts, P, G, S)
        _PARTS[starts] = (P, G, S), parts
    return parts


def _rows(x: Tensor) -> Tensor:
    """[B S, heads, d] of x [B, heads, S, d]: a view where a model has made it."""
    return x.transpose(1, 2).flatten(0, 1)


@custom_op("vesalius::prefix_attention_by", mutates_args=())
def prefix_attention_by_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, prompt_length: int, num_answers: int, scale: float, provider: str
) -> tuple[Tensor, Tensor]:
    """o [B, S, h, d] and l [h, B, S] by a provider of BY_NAME; o of padding is 0."""
    (B, _, S, _), P, attend = query.shape, prompt_length, BY_NAME[provider].forward
    q, k, v = (_rows(x) for x in (query, key, value))
    own, prompt = _parts(starts, P, num_answers, S)
    output, lse = (x.unflatten(dim, (B, S)) for dim, x in enumerate(attend(q, k, v, own, scale, True)))
    if S > P:
        other, other_lse = (x.unflatten(dim, (B, S)) for dim, x in enumerate(attend(q, k, v, prompt, scale, False)))
        o, sums = merge(output[:, P:], lse[..., P:].permute(1, 2, 0), other[:, P:], other_lse[..., P:].permute(1, 2, 0))
        output[:, P:], lse[..., P:] = o, sums.permute(2, 0, 1)
    return output.masked_fill(~_real(starts, S), 0.0), lse


@prefix_attention_by_forward.register_fake
def _(query, key, value, starts, prompt_length, num_answers, scale, provider):
    B, h, S, d = query.shape
    return query.new_empty(B, S, h, d), query.new_empty(h, B, S, dtype=torch.float32)


@custom_op("vesalius::prefix_attention_by_backward", mutates_args=())
def prefix_attention_by_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    output: Tensor,
    lse: Tensor,
    prompt_length: int,
    num_answers: int,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [B, S, h, d], dk and dv [B, S, k, d]) of grad [B, S, h, d]."""
    (B, _, S, _), P, real = query.shape, prompt_length, _real(starts, query.shape[2])
    g, o, sums = grad.masked_fill(~real, 0.0).flatten(0, 1), output.flatten(0, 1), lse.flatten(1)
    q, k, v = (_rows(x) for x in (query, key, value))

    def differentiate(part: Segments, causal: bool) -> list[Tensor]:
        return [x.unflatten(0, (B, S)) for x in BY_NAME[provider].backward(g, q, k, v, o, sums, part, scale, causal)]

    own, prompt = _parts(starts, P, num_answers, S)
    gradients = [x.masked_fill(~real, 0.0) for x in differentiate(own, True)]
    if S > P:
        others = differentiate(prompt, False)
        gradients[0][:, P:] += others[0][:, P:]
        for gradient, other in zip(gradients[1:], others[1:], strict=True):
            gradient[:, :P] += other[:, :P].masked_fill(~real[:, :P], 0.0)
    return gradients[0], gradients[1], gradients[2]


@prefix_attention_by_backward.register_fake
def _(grad, query, key, value, starts, output, lse, prompt_length, num_answers, scale, provider):
    (B, h, S, d), k = query.shape, key.shape[1]
    return query.new_empty(B, S, h, d), query.new_empty(B, S, k, d), query.new_empty(B, S, k, d)


def _real(starts: Tensor, S: int) -> Tensor:
    """[B, S, 1, 1]: whether a token is none of the padding."""
    return (torch.arange(S, device=starts.device) >= starts[:, None])[..., None, None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.prompt_length, ctx.num_answers, ctx.scale, ctx.provider = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor | None, _grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    rest = ctx.prompt_length, ctx.num_answers, ctx.scale, ctx.provider
    gradients = prefix_attention_by_backward(grad, *ctx.saved_tensors, *rest)
    return (*(x.transpose(1, 2) for x in gradients), *(None,) * 5)


prefix_attention_by_forward.register_autograd(_backward, setup_context=_setup)


def _by_mask(query: Tensor, key: Tensor, value: Tensor, P: int, G: int, starts: Tensor, scale: float) -> Tensor:
    S = query.shape[2]
    seen = seen_keys(S, P, G, query.device) & (torch.arange(S, device=query.device) >= starts[:, None, None, None])
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).masked_fill(~_real(starts, S), 0.0)


def unusable(provider: str, device: torch.device | None = None, half: bool = True) -> str | None:
    """Why a provider of PROVIDERS cannot be had here, in one line with what to do; None where it can.

    `device`: where it is to run, if that is known; `half`: in 16 bits.
    """
    package = PACKAGES.get(provider)
    if package is None:
        return None
    if importlib.util.find_spec(package) is None:
        extra = {"flash": "pip install --no-build-isolation 'vesalius[flash]'", "xformers": "pip install 'vesalius[gpu]'"}[provider]
        return f"{provider} is not installed ({extra})"
    if device is not None and device.type != "cuda":
        return f"{provider} runs on CUDA only (expected prefix or sdpa)"
    return None if half else f"{provider} has no float32 (expected --bf16, or prefix or sdpa)"


def prefix_attention_by(
    provider: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_length: int,
    num_answers: int,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`prefix_attention(query, key, ...)` as a provider of PROVIDERS computes it: arguments, result and errors are that one's."""
    if provider == "prefix":
        return prefix_attention(query, key, value, prompt_length, num_answers, start, scale)
    if provider not in PROVIDERS:
        raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, not {provider!r}")
    check_rows(query, key, value, prompt_length, num_answers, start)
    (q, k, v), P, G = in_rows(query, key, value), prompt_length, num_answers
    starts = torch.zeros(len(q), dtype=torch.int64, device=q.device) if start is None else start
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if provider == "sdpa":
        return _by_mask(q, k, v, P, G, starts, factor)
    return prefix_attention_by_forward(q, k, v, starts, P, G, factor, provider)[0]
