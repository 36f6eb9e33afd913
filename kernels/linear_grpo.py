"""The GRPO loss of a linear head in a single pass: three GEMMs a chunk, no logits kept, nothing recomputed.

The gradient of a row's logits depends on that row alone once its log-sum-exp is known (grpo_loss.py gives g = dloss/dlogp):

    z = hidden weight^T / temperature                    GEMM 1, a chunk of C rows
    logp, entropy -> g -> dz_v = g (1[v = y] - p_v)      one pass over the chunk, in place: one Triton launch
    dhidden = dz weight / temperature                    GEMM 2
    dweight += dz^T hidden / temperature                 GEMM 3, added in fp32 over chunks; left out for a frozen head

B rows (completions), T tokens, H hidden, V vocabulary. The forward makes the gradients, the backward scales them. With sequence
level importance sampling g needs the ratio of the whole sequence, so chunks end at sequence ends. Masked tokens cost nothing: on
CUDA one synchronisation with the host counts the others. A token whose y is outside 0 to V - 1 (-100) is masked. 6 H V FLOP a
token; working memory is C V logits in the dtype of `hidden` and, of several chunks, one fp32 dweight. TRL's and Liger's chunked
losses recompute the logits in backward (four GEMMs), Liger's in fp32.

The op is opaque to torch.compile for the reason given in linear_logprob.py.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from kernels.grpo_loss import STATS, grpo_loss_forward, grpo_loss_reference, metrics_of
from kernels.grpo_terms import (
    GRPOLoss,
    TokenInputs,
    check_tokens,
    in_type,
    item_count,
    loss_gradient,
    needed_reference,
    row_weights,
    token_terms_kernel,
)
from kernels.language import tl, triton
from kernels.launch import LARGE_SHARED, SMALL_SHARED, LaunchConfig, launch, runs_triton, shared_bytes
from kernels.linear_logprob import (
    LOG2E,
    accumulate_dtype,
    add_outer,
    chunk_size,
    head_operands,
    in_chunks,
    in_vocabulary,
    linear_logprob_reference,
    logit_buffer,
    logit_gradient_,
    online_stats,
    row_stats,
    row_stride,
    sum_dtype,
    weight_gradient,
    write_gradient,
)


def linear_grpo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: GRPOLoss,
    *,
    temperature: float = 1.0,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    policy_mask: Tensor | None = None,
    num_items: Tensor | float | None = None,
    num_rows: int | None = None,
) -> Tensor:
    """The specification of the loss of `linear_grpo_loss`, differentiable by autograd in any floating dtype."""
    logprobs, _ = linear_logprob_reference(hidden.flatten(0, 1), weight, target_ids.flatten(), temperature=temperature)
    return grpo_loss_reference(
        logprobs.view(mask.shape),
        advantages,
        mask * in_vocabulary(target_ids, weight),
        loss,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        policy_mask=policy_mask,
        num_items=num_items,
        num_rows=num_rows,
    )


def _row_constants(dtype: torch.dtype, num_columns: int, shared: int) -> dict[str, Any]:
    """32 KB of a row at a time and four such blocks in flight: 128 KB of shared memory, so one program fills a multiprocessor.

    The 132 rows that an H100 then has in hand, 304 KB each, fit its L2 cache of 50 MB: the second sweep finds its row there.
    Devices that give a program less (99 KB: sm_86, sm_89) have five blocks of 16 KB in flight. Rows that are not aligned (an odd
    vocabulary) are copied by single elements, which is not worth a pipeline.
    As no second program fits, a thread may have up to 128 registers: told so, ptxas spills none on sm_100, where it keeps to 64.
    """
    if num_columns % 16 or shared < 96 << 10:
        return {"BLOCK": 16384 // dtype.itemsize, "STAGES": 1, "num_warps": 16}
    if shared <= 128 << 10:
        return {"BLOCK": 16384 // dtype.itemsize, "STAGES": 6, "num_warps": 16}
    return {"BLOCK": 32768 // dtype.itemsize, "STAGES": 5, "num_warps": 16, "maxnreg": 96}


class TokenOutputs(NamedTuple):
    """What a token's row of logits yields, (B, T) each; in a kernel pointers."""

    logprobs: Any
    entropies: Any


@triton.jit
def _row_kernel(
    logits, stride, tokens, target_ids, advantages, weights, given, out, num_columns, num_tokens, scale, numbers,
    GRADIENT: tl.constexpr, CISPO: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A row of the chunk is token `token` of the flattened (B, T): statistics, loss gradient, and dlogits over the logits.
    # `given` is a TokenInputs, `out` a TokenOutputs, `numbers` a LossNumbers
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    token = tl.load(tokens + index)
    sequence = token // num_tokens
    target = tl.load(target_ids + token)
    there = (target >= 0) & (target < num_columns)
    chosen = tl.load(row + target, mask=there, other=0.0).to(tl.float32)
    top, total, moment = online_stats(row, num_columns, scale, BLOCK, STAGES)
    log_total = tl.log(total)
    logprob = tl.where(there, (chosen - top) * scale / LOG2E - log_total, 0.0)
    tl.store(out.logprobs + token, logprob)
    tl.store(out.entropies + token, log_total - moment / total)
    if GRADIENT:
        log_ratio, ref, policy = tl.full([], 0.0, tl.float32), logprob, 1.0
        if given.old_logprobs is not None:
            log_ratio = logprob - tl.load(given.old_logprobs + token).to(tl.float32)
        if given.ref_logprobs is not None:
            ref = tl.load(given.ref_logprobs + token).to(tl.float32)
        if given.policy_mask is not None:
            policy = tl.load(given.policy_mask + token).to(tl.float32)
        advantage = tl.load(advantages + sequence).to(tl.float32)
        _, direct, through, _, _ = token_terms_kernel(
            logprob, log_ratio, advantage, ref, policy,
            numbers.low_edge, numbers.high_edge, numbers.delta, numbers.beta, CISPO, KL,
        )  # fmt: skip
        gain = tl.where(there, tl.load(weights + sequence) * (direct + through) * (scale / LOG2E), 0.0)
        write_gradient(row, num_columns, target, chosen, scale, top, total, 0.0, gain, 0.0, False, BLOCK, STAGES)


def launch_configs() -> Iterator[LaunchConfig]:
    """Rows of V = 151936 in bf16: on-policy, off-policy with KL, cispo, as on sm_89; an odd vocabulary in bf16 and fp32."""
    ids = torch.empty(0, dtype=torch.int64, device="meta")
    vector = torch.empty(0, device="meta")
    plain, large = GRPOLoss("grpo"), LARGE_SHARED
    ratio, classic = GRPOLoss("grpo", beta=0.04), GRPOLoss("grpo", beta=0.04, use_bias_correction_kl=False)
    for name, dtype, columns, shared, loss in (
        ("on-policy", torch.bfloat16, 151936, large, plain),
        ("without gradient", torch.bfloat16, 151936, large, plain),
        ("off-policy with KL", torch.bfloat16, 151936, large, ratio),
        ("cispo", torch.bfloat16, 151936, large, GRPOLoss("cispo", epsilon_high=5.0)),
        ("99 KB of shared memory", torch.bfloat16, 151936, SMALL_SHARED, ratio),
        ("odd vocabulary", torch.bfloat16, 50257, large, ratio),
        ("fp32, odd vocabulary", torch.float32, 50257, large, classic),
    ):
        logits = torch.empty(0, dtype=dtype, device="meta")
        given = TokenInputs(None if name == "on-policy" else vector, vector if loss.beta else None)
        sizes, out = (columns, 200, LOG2E.value), TokenOutputs(vector, vector)
        arguments = (logits, row_stride(columns), ids, ids, vector, vector, given, out, *sizes, loss.numbers)
        constants = {"GRADIENT": name != "without gradient"} | loss.kernel_flags | _row_constants(dtype, columns, shared)
        archs = (80, 90, 100) if shared == large else (89,)
        yield LaunchConfig(f"grpo row, {name}", _row_kernel, arguments, constants, archs)


def _chunks_of_tokens(mask: Tensor, size: int, whole_rows: bool) -> list[tuple[Tensor, slice | None]]:
    """Chunks of the tokens that count: indices into the flattened (B, T), and the rows they fill where those are kept whole."""
    tokens = mask.flatten().nonzero()[:, 0]
    if not whole_rows:
        return [(chunk, None) for chunk in in_chunks(tokens, size)]
    chunks: list[tuple[Tensor, slice | None]] = []
    begin, first, count = 0, 0, 0
    for row, length in enumerate([*(mask != 0).sum(-1).tolist(), size + 1]):  # the last one closes the last chunk
        if count and count + length > size:
            chunks.append((tokens[begin : begin + count], slice(first, row)))
            begin, first, count = begin + count, row, 0
        count += length
    return chunks


@custom_op("vesalius::linear_grpo", mutates_args=())
def linear_grpo_forward(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    policy_mask: Tensor | None,
    num_items: Tensor | None,
    denominator: float,
    temperature: float,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats, logprobs, dhidden, dweight) of the GRPOLoss whose `text` is `loss`; gradients are empty where not needed."""
    settings, given = GRPOLoss.of_text(loss), TokenInputs(old_logprobs, ref_logprobs, policy_mask)
    num_tokens, need_gradient = mask.shape[1], need_hidden or need_weight
    logprobs, entropies = hidden.new_zeros((2, *mask.shape), dtype=accumulate_dtype(hidden.dtype)).unbind()
    flat = given.each(lambda tensor: tensor.flatten().contiguous())  # flattened, one column of many stays strided
    flat_hidden, flat_ids = hidden.flatten(0, 1), target_ids.flatten().contiguous()
    weights = row_weights(mask, num_items, denominator, settings, logprobs.dtype)
    chunks = _chunks_of_tokens(mask, chunk_rows or chunk_size(hidden, weight), settings.by_sequence)
    buffer = logit_buffer(hidden, max([len(tokens) for tokens, _ in chunks], default=0), len(weight))
    grad_hidden = hidden.new_zeros(flat_hidden.shape if need_hidden else 0)
    grad_weight, dtype = None, sum_dtype(weight.dtype, len(chunks))

    for tokens, rows in chunks:
        x = flat_hidden[tokens]
        logits = torch.mm(x, weight.T, out=buffer[: len(tokens)])
        if rows is None and runs_triton(logits):
            sizes, out = (len(weight), num_tokens, LOG2E.value / temperature), TokenOutputs(logprobs, entropies)
            per_row = (tokens, flat_ids, advantages.contiguous(), weights)
            flags = {"GRADIENT": need_gradient} | settings.kernel_flags
            constants = flags | _row_constants(logits.dtype, len(weight), shared_bytes(logits.device))
            arguments = (logits, logits.stride(0), *per_row, flat, out, *sizes, settings.numbers)
            launch(_row_kernel, (len(tokens),), *arguments, **constants)
        else:
            ids = flat_ids[tokens]
            of_chunk, entropy, softmax = row_stats(logits, ids, 1 / temperature)
            logprobs.view(-1)[tokens], entropies.view(-1)[tokens] = of_chunk, entropy
            if not need_gradient:
                continue
            if rows is None:  # each token as a row of its own
                sequences, column = tokens // num_tokens, of_chunk[:, None]
                beside, ones = flat.select((tokens, None)), torch.ones_like(column)
                gain = loss_gradient(column, advantages[sequences], ones, weights[sequences], beside, settings).gradient[:, 0]
            else:
                whole = (logprobs[rows], advantages[rows], mask[rows], *given.select(rows))
                _, gain, _ = grpo_loss_forward(*whole, None, num_items, denominator, loss)
                gain = gain.flatten()[tokens - rows.start * num_tokens]
            logit_gradient_(logits, ids, 1 / temperature, softmax, gain)
        if need_hidden:
            grad_hidden[tokens] = logits @ weight
        if need_weight:
            grad_weight = add_outer(grad_weight, logits, x, dtype)

    value, _, metrics = grpo_loss_forward(logprobs, advantages, mask, *given, entropies, num_items, denominator, loss)
    grad_hidden = grad_hidden.view_as(hidden) if need_hidden else grad_hidden
    return value, metrics, logprobs, grad_hidden, weight_gradient(grad_weight, weight, need_weight)


@linear_grpo_forward.register_fake
def _(
    hidden, weight, target_ids, advantages, mask, old, ref, policy, items, denominator, temperature, chunk_rows,
    need_hidden, need_weight, loss,
):  # fmt: skip
    vector = hidden.new_empty(mask.shape, dtype=accumulate_dtype(hidden.dtype))
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    return vector.new_empty(()), vector.new_empty(len(STATS)), vector, grad_hidden, grad_weight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])
    *_, need_hidden, need_weight, _ = inputs
    ctx.needed, ctx.num_inputs, ctx.spent = (need_hidden, need_weight), len(inputs), False


def _scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """gradient * grad_loss, over `gradient` where it is a real tensor: dweight need not be held twice."""
    return gradient.mul_(grad_loss) if type(gradient) is torch.Tensor else gradient * grad_loss.to(gradient.dtype)


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.spent:
        raise RuntimeError(
            "linear_grpo_loss has one backward: the forward made its gradients, and the first backward has scaled them in place; "
            "for another call it again, or add what is to be differentiated into one loss"
        )
    ctx.spent = True
    kept = zip(ctx.saved_tensors, ctx.needed, strict=True)
    gradients = [_scaled(gradient, grad_loss) if needed and grad_loss is not None else None for gradient, needed in kept]
    return *gradients, *[None] * (ctx.num_inputs - 2)


linear_grpo_forward.register_autograd(_backward, setup_context=_setup)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: GRPOLoss,
    *,
    temperature: float = 1.0,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    policy_mask: Tensor | None = None,
    num_items: Tensor | float | None = None,
    num_rows: int | None = None,
    chunk_rows: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss (0-dim), detached logprobs (B, T) float32 and metrics of a head's `hidden` (B, T, H) and `weight` (V, H).

    `target_ids` (B, T); the arguments from `advantages` on are those of `grpo_loss`. Differentiable once in hidden and weight,
    whose gradients are made in the forward where they require grad: a second backward raises RuntimeError, retained graph or not.
    Masked tokens have logprob 0 and may hold anything; a target outside 0 to V - 1 (-100) masks its token. `chunk_rows` caps the
    rows of logits held at once (0: by memory). For a policy mask by entropy take the entropies from `linear_logprob` under no_grad:
    the mask of all tokens is needed before the gradient of the first. Raises ValueError naming the argument, also for float16.
    """
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(f"hidden and weight must be (B, T, H) and (V, H), not {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    ref_logprobs = needed_reference(loss, ref_logprobs)
    check_tokens(hidden.shape[:2], target_ids=target_ids, mask=mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    check_tokens(hidden.shape[:2], policy_mask=policy_mask)
    check_tokens(hidden.shape[:1], advantages=advantages)
    hidden, weight = head_operands(hidden, weight)
    if hidden.dtype == torch.float16:
        raise ValueError("hidden must be bfloat16, float32 or float64: the gradient of a logit is too small for float16")
    mask = mask * in_vocabulary(target_ids, weight)
    dtype = accumulate_dtype(hidden.dtype)
    advantages, given = advantages.to(dtype), in_type(dtype, old_logprobs, ref_logprobs, policy_mask)
    grad = torch.is_grad_enabled()
    value, stats, logprobs, _, _ = linear_grpo_forward(
        hidden,
        weight,
        target_ids.long(),
        advantages,
        mask,
        *given,
        item_count(mask, num_items, loss),
        loss.denominator(num_rows or hidden.shape[0]),
        temperature,
        chunk_rows,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        loss.text,
    )
    return value, logprobs, metrics_of(stats, loss, entropy=True)
