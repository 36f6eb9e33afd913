"""The GRPO loss of a linear head in a single pass: three GEMMs a chunk, no logits kept, nothing recomputed.

The gradient of a row's logits depends on that row alone once its log-sum-exp is known (grpo_loss.py gives g = dloss/dlogp):

    z = hidden weight^T / temperature                    GEMM 1, a chunk of C rows
    logp, entropy -> g -> dz_v = g (1[v = y] - p_v)      one pass over the chunk, in place: one Triton launch
    dhidden = dz weight / temperature                    GEMM 2
    dweight += dz^T hidden / temperature                 GEMM 3, accumulated in fp32; left out for a frozen head

B rows (completions), T tokens, H hidden, V vocabulary. The forward makes the gradients, the backward scales them. With sequence
level importance sampling g needs the ratio of the whole sequence, so chunks end at sequence ends. Masked tokens cost nothing: on
CUDA one synchronisation with the host counts the others. 6 H V FLOP a token; working memory is C V logits in the dtype of `hidden`
and one fp32 dweight. TRL's and Liger's chunked losses recompute the logits in backward (four GEMMs), Liger's in fp32.

The op is opaque to torch.compile for the reason given in linear_logprob.py.
"""

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from kernels.grpo_loss import grpo_loss_forward, grpo_loss_reference, metrics_of
from kernels.grpo_terms import (
    LossSettings,
    check_tokens,
    item_count,
    kl_kind,
    loss_gradient,
    loss_settings,
    row_weights,
    token_terms_kernel,
)
from kernels.launch import LARGE_SHARED, SMALL_SHARED, LaunchConfig, runs_triton, shared_bytes
from kernels.linear_logprob import (
    LOG2E,
    accumulate_dtype,
    add_outer_,
    chunk_size,
    head_operands,
    in_chunks,
    linear_logprob_reference,
    logit_gradient_,
    online_stats,
    row_stats,
    write_gradient,
)


def linear_grpo_loss_reference(hidden, weight, target_ids, advantages, mask, *, temperature=1.0, **settings):
    """The specification of the loss of `linear_grpo_loss`, differentiable by autograd in any floating dtype."""
    logprobs, _ = linear_logprob_reference(hidden.flatten(0, 1), weight, target_ids.flatten(), temperature=temperature)
    return grpo_loss_reference(logprobs.view(mask.shape), advantages, mask, **settings)


def _row_constants(dtype: torch.dtype, num_columns: int, shared: int) -> dict:
    """32 KB of a row at a time and four such blocks in flight: 128 KB of shared memory, so one program fills a multiprocessor.

    The 132 rows that an H100 then has in hand, 304 KB each, fit its L2 cache of 50 MB: the second sweep finds its row there.
    Devices that give a program less (99 KB: sm_86, sm_89) have five blocks of 16 KB in flight. Rows that are not aligned (an odd
    vocabulary) are copied by single elements, which is not worth a pipeline.
    """
    if num_columns % 16 or shared < 96 << 10:
        block_bytes, stages = 16384, 1
    else:
        block_bytes, stages = (32768, 5) if shared > 128 << 10 else (16384, 6)
    return {"BLOCK": block_bytes // dtype.itemsize, "STAGES": stages, "num_warps": 16}


@triton.jit
def _row_kernel(
    logits, stride, tokens, target_ids, advantages, weights, old_logprobs, ref_logprobs, policy_mask, logprobs, entropies,
    num_columns, num_tokens, scale, low_edge, high_edge, delta, beta,
    GRADIENT: tl.constexpr, CISPO: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A row of the chunk is token `token` of the flattened (B, T): statistics, loss gradient, and dlogits over the logits
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    token = tl.load(tokens + index)
    sequence = token // num_tokens
    target = tl.load(target_ids + token)
    chosen = tl.load(row + target).to(tl.float32)
    top, total, moment = online_stats(row, num_columns, scale, BLOCK, STAGES)
    log_total = tl.log(total)
    logprob = (chosen - top) * scale / LOG2E - log_total
    tl.store(logprobs + token, logprob)
    tl.store(entropies + token, log_total - moment / total)
    if GRADIENT:
        log_ratio, ref, policy = tl.full([], 0.0, tl.float32), logprob, 1.0
        if old_logprobs is not None:
            log_ratio = logprob - tl.load(old_logprobs + token).to(tl.float32)
        if ref_logprobs is not None:
            ref = tl.load(ref_logprobs + token).to(tl.float32)
        if policy_mask is not None:
            policy = tl.load(policy_mask + token).to(tl.float32)
        advantage = tl.load(advantages + sequence).to(tl.float32)
        _, direct, through, _, _ = token_terms_kernel(
            logprob, log_ratio, advantage, ref, policy, low_edge, high_edge, delta, beta, CISPO, KL
        )
        gain = tl.load(weights + sequence) * (direct + through) * (scale / LOG2E)
        write_gradient(row, num_columns, target, chosen, scale, top, total, 0.0, gain, 0.0, False, BLOCK, STAGES)


def launch_configs():
    """Rows of V = 151936 in bf16: on-policy, off-policy with KL, cispo, as on sm_89; fp32 rows of an odd vocabulary."""
    ids = torch.empty(0, dtype=torch.int64, device="meta")
    vector = torch.empty(0, device="meta")
    numbers = (200, 1.4427, 0.8, 1.2, float("inf"), 0.04)
    plain, large = {"GRADIENT": True, "CISPO": False, "KL": "none"}, LARGE_SHARED
    for name, dtype, columns, shared, flags in (
        ("on-policy", torch.bfloat16, 151936, large, plain),
        ("without gradient", torch.bfloat16, 151936, large, plain | {"GRADIENT": False}),
        ("off-policy with KL", torch.bfloat16, 151936, large, plain | {"KL": "ratio"}),
        ("cispo", torch.bfloat16, 151936, large, plain | {"CISPO": True}),
        ("99 KB of shared memory", torch.bfloat16, 151936, SMALL_SHARED, plain | {"KL": "ratio"}),
        ("fp32, odd vocabulary", torch.float32, 50257, large, plain | {"KL": "plain"}),
    ):
        old, ref = None if name == "on-policy" else vector, None if flags["KL"] == "none" else vector
        logits = torch.empty(0, dtype=dtype, device="meta")
        arguments = (logits, columns, ids, ids, vector, vector, old, ref, None, vector, vector, columns, *numbers)
        constants = flags | _row_constants(dtype, columns, shared)
        archs = (80, 90, 100) if shared == large else (89,)
        yield LaunchConfig(f"grpo row, {name}", _row_kernel, arguments, constants, archs)


def _chunks_of_tokens(mask, size, whole_rows):
    """Chunks of the tokens that count: indices into the flattened (B, T), and the rows they fill where those are kept whole."""
    tokens = mask.flatten().nonzero()[:, 0]
    if not whole_rows:
        return [(chunk, None) for chunk in in_chunks(tokens, size)]
    chunks, begin, first, count = [], 0, 0, 0
    for row, length in enumerate([*(mask != 0).sum(-1).tolist(), size + 1]):  # the last one closes the last chunk
        if count and count + length > size:
            chunks.append((tokens[begin : begin + count], slice(first, row)))
            begin, first, count = begin + count, row, 0
        count += length
    return chunks


@custom_op("vesalius::linear_grpo", mutates_args=())
def linear_grpo_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    policy_mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    temperature: float,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    low_edge: float,
    high_edge: float,
    delta: float,
    beta: float,
    denominator: float,
    cispo: bool,
    sequence_level: bool,
    by_length: bool,
    bias_correction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, stats, logprobs, dhidden, dweight); the gradients are empty where not needed."""
    settings = LossSettings(low_edge, high_edge, delta, beta, denominator, cispo, sequence_level, by_length, bias_correction)
    num_tokens, need_gradient = mask.shape[1], need_hidden or need_weight
    logprobs, entropies = hidden.new_zeros((2, *mask.shape), dtype=accumulate_dtype(hidden.dtype)).unbind()
    of_tokens = (old_logprobs, ref_logprobs, policy_mask)
    flat = [x if x is None else x.flatten() for x in of_tokens]
    flat_hidden, flat_ids = hidden.flatten(0, 1), target_ids.flatten()
    weights = row_weights(mask, num_items, settings, logprobs.dtype)
    chunks = _chunks_of_tokens(mask, chunk_rows or chunk_size(hidden, weight), sequence_level)
    buffer = hidden.new_empty((max([len(tokens) for tokens, _ in chunks], default=0), len(weight)))
    grad_hidden = torch.zeros_like(flat_hidden) if need_hidden else hidden.new_empty(0)
    # dweight is summed in fp32 over chunks; a single chunk is summed by its GEMM
    dtype = weight.dtype if len(chunks) == 1 else accumulate_dtype(weight.dtype)
    grad_weight = weight.new_zeros(weight.shape if need_weight else 0, dtype=dtype)

    for tokens, rows in chunks:
        x = flat_hidden[tokens]
        logits = torch.mm(x, weight.T, out=buffer[: len(tokens)])
        if rows is None and runs_triton(logits):
            per_token = (tokens, flat_ids, advantages.contiguous(), weights, *flat, logprobs, entropies)
            numbers = (len(weight), num_tokens, LOG2E.value / temperature, *settings[:4])
            flags = {"GRADIENT": need_gradient, "CISPO": cispo, "KL": kl_kind(settings)}
            constants = flags | _row_constants(logits.dtype, len(weight), shared_bytes(logits.device))
            _row_kernel[(len(tokens),)](logits, logits.stride(0), *per_token, *numbers, **constants)
        else:
            stats = row_stats(logits, flat_ids[tokens], 1 / temperature)
            logprobs.view(-1)[tokens], entropies.view(-1)[tokens] = stats[:2]
            if need_gradient and rows is None:
                sequences, column = tokens // num_tokens, [x if x is None else x[tokens, None] for x in flat]
                ones = torch.ones_like(stats[0][:, None])
                gain = loss_gradient(stats[0][:, None], advantages[sequences], ones, weights[sequences], *column, settings)[1]
                logit_gradient_(logits, flat_ids[tokens], 1 / temperature, stats, gain[:, 0])
            elif need_gradient:
                part = [x if x is None else x[rows] for x in of_tokens]
                _, gain, _ = grpo_loss_forward(logprobs[rows], advantages[rows], mask[rows], *part, None, num_items, *settings)
                gain = gain.flatten()[tokens - rows.start * num_tokens]
                logit_gradient_(logits, flat_ids[tokens], 1 / temperature, stats, gain)
        if need_hidden:
            grad_hidden[tokens] = logits @ weight
        if need_weight:
            add_outer_(grad_weight, logits, x)

    loss, _, stats = grpo_loss_forward(logprobs, advantages, mask, *of_tokens, entropies, num_items, *settings)
    return loss, stats, logprobs, grad_hidden.view_as(hidden) if need_hidden else grad_hidden, grad_weight.to(weight.dtype)


@linear_grpo_forward.register_fake
def _(
    hidden, weight, target_ids, advantages, mask, old, ref, policy, items, temperature, chunk, need_hidden, need_weight, *settings
):
    vector = hidden.new_empty(mask.shape, dtype=accumulate_dtype(hidden.dtype))
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    return vector.new_empty(()), vector.new_empty(7), vector, grad_hidden, grad_weight


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])
    ctx.needed = inputs[11:13]


def _scaled(gradient, grad_loss):
    """gradient * grad_loss, over `gradient` where it is a real tensor: dweight need not be held twice."""
    return gradient.mul_(grad_loss) if type(gradient) is torch.Tensor else gradient * grad_loss.to(gradient.dtype)


def _backward(ctx, grad_loss, *_):
    kept = zip(ctx.saved_tensors, ctx.needed, strict=True)
    gradients = [_scaled(gradient, grad_loss) if needed and grad_loss is not None else None for gradient, needed in kept]
    return *gradients, *[None] * 20


linear_grpo_forward.register_autograd(_backward, setup_context=_setup)


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float = 1.0,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    policy_mask: torch.Tensor | None = None,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = True,
    max_completion_length: int | None = None,
    num_items: torch.Tensor | float | None = None,
    num_rows: int | None = None,
    chunk_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (0-dim), detached logprobs (B, T) float32 and metrics of a head's `hidden` (B, T, H) and `weight` (V, H).

    `target_ids` and `mask` (B, T), `advantages` (B,); the loss settings are those of `grpo_loss`. Differentiable once in hidden
    and weight, whose gradients are made in the forward where they require grad. Masked tokens have logprob 0 and may hold
    anything. `chunk_rows` caps the rows of logits held at once (0: by memory). For a policy mask by entropy take the entropies
    from `linear_logprob` under no_grad: the mask of all tokens is needed before the gradient of the first. Raises ValueError, also
    for float16.
    """
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(f"hidden and weight must be (B, T, H) and (V, H), not {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if beta and ref_logprobs is None:
        raise ValueError("ref_logprobs must be given where beta is not 0")
    check_tokens(hidden.shape[:2], target_ids=target_ids, mask=mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    check_tokens(hidden.shape[:2], policy_mask=policy_mask)
    check_tokens(hidden.shape[:1], advantages=advantages)
    settings = loss_settings(
        num_rows or hidden.shape[0],
        loss_type,
        epsilon,
        epsilon_high,
        delta,
        beta,
        importance_sampling_level,
        use_bias_correction_kl,
        max_completion_length,
    )
    hidden, weight = head_operands(hidden, weight)
    if hidden.dtype == torch.float16:
        raise ValueError("hidden must be bfloat16, float32 or float64: the gradient of a logit is too small for float16")
    grad = torch.is_grad_enabled()
    loss, stats, logprobs, _, _ = linear_grpo_forward(
        hidden,
        weight,
        target_ids,
        advantages,
        mask,
        old_logprobs,
        ref_logprobs if beta else None,
        policy_mask,
        item_count(mask, num_items, loss_type),
        temperature,
        chunk_rows,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        *settings,
    )
    return loss, logprobs, metrics_of(stats, settings, entropy=True)
