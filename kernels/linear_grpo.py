"""The GRPO loss of a linear head in a single pass: three GEMMs a chunk, no logits kept, nothing recomputed.

The gradient of a row's logits depends on that row alone once its log-sum-exp is known (grpo_loss.py gives g = dloss/dlogp):

    z = hidden weight^T / temperature                    GEMM 1, a chunk of C rows
    logp, entropy -> g -> dz_v = g (1[v = y] - p_v)      one pass over the chunk, in place
    dhidden = dz weight / temperature                    GEMM 2
    dweight += dz^T hidden / temperature                 GEMM 3, accumulated in fp32; left out for a frozen head

B rows (completions), T tokens, H hidden, V vocabulary. The forward makes the gradients, the backward scales them. With sequence
level importance sampling g needs the ratio of the whole sequence, so chunks end at sequence ends. Masked tokens cost nothing.
6 H V FLOP a token; working memory is C V logits in the dtype of `hidden` and one fp32 dweight. TRL's and Liger's chunked losses
recompute the logits in backward (four GEMMs), Liger's in fp32.
"""

import torch
from torch.library import custom_op

from kernels.grpo_loss import (
    LossSettings,
    check_tokens,
    grpo_loss_forward,
    grpo_loss_reference,
    item_count,
    loss_gradient,
    loss_settings,
    metrics_of,
    row_weights,
)
from kernels.linear_logprob import (
    accumulate_dtype,
    add_outer_,
    chunk_size,
    head_operands,
    linear_logprob_reference,
    logit_gradient_,
    row_stats,
)


def linear_grpo_loss_reference(hidden, weight, target_ids, advantages, mask, *, temperature=1.0, **settings):
    """The specification of the loss of `linear_grpo_loss`, differentiable by autograd in any floating dtype."""
    logprobs, _ = linear_logprob_reference(hidden.flatten(0, 1), weight, target_ids.flatten(), temperature=temperature)
    return grpo_loss_reference(logprobs.view(mask.shape), advantages, mask, **settings)


def _chunks_of_tokens(mask, size, whole_rows):
    """Indices into the flattened (B, T) of the tokens that count, in chunks of `size`, or of whole rows of about that size."""
    tokens = mask.flatten().nonzero()[:, 0]
    if not whole_rows:
        return tokens.split(size)
    lengths, packed = [], size
    for length in (mask != 0).sum(-1).tolist():
        if packed + length > size:
            lengths.append(0)
            packed = 0
        lengths[-1] += length
        packed += length
    return tokens.split(lengths)


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
    num_tokens = mask.shape[1]
    logprobs, entropies = hidden.new_zeros((2, *mask.shape), dtype=accumulate_dtype(hidden.dtype)).unbind()
    per_token = [x if x is None else x.flatten() for x in (old_logprobs, ref_logprobs, policy_mask)]
    weights = row_weights(mask, num_items, settings, logprobs.dtype)
    flat_hidden, flat_ids = hidden.flatten(0, 1), target_ids.flatten()
    grad_hidden = torch.zeros_like(flat_hidden) if need_hidden else hidden.new_empty(0)
    total = weight.new_zeros(weight.shape if need_weight else 0, dtype=accumulate_dtype(weight.dtype))
    size = chunk_rows or chunk_size(hidden, weight)
    buffer = None
    for tokens in _chunks_of_tokens(mask, size, sequence_level):
        if buffer is None or len(buffer) < len(tokens):
            buffer = hidden.new_empty((len(tokens), len(weight)))
        x, ids = flat_hidden[tokens], flat_ids[tokens]
        logits = torch.mm(x, weight.T, out=buffer[: len(tokens)])
        stats = row_stats(logits, ids, 1 / temperature)
        logprobs.view(-1)[tokens], entropies.view(-1)[tokens] = stats[:2]
        if not (need_hidden or need_weight):
            continue
        if sequence_level:
            rows = slice(int(tokens[0]) // num_tokens, int(tokens[-1]) // num_tokens + 1)
            grid = [x if x is None else x[rows] for x in (old_logprobs, ref_logprobs, policy_mask)]
            gradient = loss_gradient(logprobs[rows], advantages[rows], mask[rows], weights[rows], *grid, settings)[1]
            gradient = gradient.flatten()[tokens - rows.start * num_tokens]
        else:
            rows = tokens // num_tokens
            column = [x if x is None else x[tokens, None] for x in (mask.flatten(), *per_token)]
            gradient = loss_gradient(stats[0][:, None], advantages[rows], column[0], weights[rows], *column[1:], settings)[1][:, 0]
        logit_gradient_(logits, ids, 1 / temperature, stats, gradient)
        if need_hidden:
            grad_hidden[tokens] = logits @ weight
        if need_weight:
            add_outer_(total, logits, x, first=False)
    loss, _, stats = grpo_loss_forward(
        logprobs, advantages, mask, old_logprobs, ref_logprobs, policy_mask, entropies, num_items, *settings
    )
    return loss, stats, logprobs, grad_hidden.view_as(hidden) if need_hidden else grad_hidden, total.to(weight.dtype)


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


def _backward(ctx, grad_loss, *_):
    grad_hidden, grad_weight = [
        gradient.mul_(grad_loss) if needed and grad_loss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    ]
    return grad_hidden, grad_weight, *[None] * 20


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
    from `linear_logprob` under no_grad: the mask of all tokens is needed before the gradient of the first. Raises ValueError.
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
