"""The single-pass head against TRL's golden values, against autograd in float64, and what it promises about memory and bits."""

import pytest
import torch

from kernels.grpo_loss import grpo_loss_reference
from kernels.grpo_terms import GRPOLoss
from kernels.linear_grpo import linear_grpo_loss, linear_grpo_loss_reference
from kernels.linear_logprob import linear_logprob_reference
from tests.kernels.golden_cases import loss_cases
from tests.kernels.test_grpo_loss import assert_golden, each_variant

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN slice"),  # numpy, in the interpreter
]


PLAIN, KL = GRPOLoss(), GRPOLoss(beta=0.1)
BY_SEQUENCE = GRPOLoss(importance_sampling_level="sequence")


def run_golden(case, dtype):
    """The case's logits as hidden Q^T with a random orthogonal head Q; its gradient is rotated back."""
    vocabulary = case.logits.shape[-1]
    head = torch.linalg.qr(torch.randn(vocabulary, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    hidden = (case.logits @ head).to(dtype).requires_grad_()
    weight = head.to(dtype).requires_grad_()
    options = {key: x.to(dtype) if isinstance(x, torch.Tensor) else x for key, x in case.given.items()}
    options |= {"temperature": case.temperature, "chunk_rows": 9}
    tensors = (hidden, weight, case.target_ids, case.advantages.to(dtype), case.mask)
    loss, logprobs, metrics = linear_grpo_loss(*tensors, case.loss, **options)
    loss.backward()
    expected = case.logprobs(case.logits)[0] * case.mask
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = hidden.grad.double() @ head.T
    # dweight = dlogits^T hidden
    dweight = gradient.flatten(0, 1).T @ hidden.detach().double().flatten(0, 1)
    torch.testing.assert_close(weight.grad.double(), dweight, rtol=1e-5, atol=1e-6)
    return loss.item(), gradient, metrics


def test_every_golden_case(golden):
    for case in loss_cases(golden):
        assert_golden(case, *run_golden(case, torch.float64), tolerance=1e-6)


def draw(rows, tokens, hidden_size, vocabulary, dtype=torch.float32, number=0):
    """Seeded (hidden, weight, target_ids, advantages, mask) and what is given: ragged rows, one masked, old and reference."""
    generator = torch.Generator().manual_seed(rows * vocabulary + number)
    hidden = torch.randn(rows, tokens, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) * 2 / hidden_size**0.5).to(dtype)
    target_ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)).long()
    mask[0] = rows == 1
    logprobs = linear_logprob_reference(hidden.float().flatten(0, 1), weight.float(), target_ids.flatten())[0].view(rows, tokens)
    old = logprobs + 0.3 * torch.randn(rows, tokens, generator=generator)
    ref = logprobs + 0.3 * torch.randn(rows, tokens, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    return (hidden, weight, target_ids, advantages, mask), {"old_logprobs": old, "ref_logprobs": ref, "num_items": 17.0}


def run(loss_of, tensors, given, dtype, kind=PLAIN):
    """Loss and both gradients in float64."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in tensors[:2])
    result = loss_of(hidden, weight, *tensors[2:], kind, **given)
    loss = result[0] if isinstance(result, tuple) else result
    loss.backward()
    return [x.detach().double() for x in (loss, hidden.grad, weight.grad)]


# What a rounding of a log-prob of magnitude 10 does to the importance ratio, and a rounding of bfloat16
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def check(shape, kind, dtype=torch.float32, draws=1, **options):
    """Errors of at most twice eager's in the same dtype, or of a rounding; both over several draws where one has few tokens."""
    errors = torch.zeros(2, 3, dtype=torch.float64)
    for number in range(draws):
        tensors, given = draw(*shape, dtype=dtype, number=number)
        given |= options
        ours = run(linear_grpo_loss, tensors, given | {"chunk_rows": 5}, dtype, kind)
        eager = run(linear_grpo_loss_reference, tensors, given, dtype, kind)
        exact = run(linear_grpo_loss_reference, tensors, given, torch.float64, kind)
        scales = [truth.norm().clamp(min=1e-2) for truth in exact]
        for row, values in zip(errors, (ours, eager), strict=True):
            row += torch.stack([(x - y).norm() / scale for x, y, scale in zip(values, exact, scales, strict=True)]) ** 2 / draws
    for name, error, eager_error in zip(("loss", "dhidden", "dweight"), *errors.sqrt(), strict=True):
        assert error <= 2 * eager_error + FLOOR[dtype], f"{name}: {error:.2e} where eager has {eager_error:.2e}"


@each_variant
def test_float32_is_as_exact_as_eager(variant):
    check((5, 9, 16, 257), variant, num_rows=11)


@pytest.mark.parametrize("shape", [(3, 4, 8, 1000), (1, 1, 8, 33), (3, 1, 8, 151936), (2, 3, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_shapes_in_both_precisions(shape, dtype):
    check(shape, KL, dtype=dtype)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_chunk_does_not_change_the_result(level):
    tensors, given = draw(6, 7, 8, 33)
    kind = GRPOLoss(importance_sampling_level=level, beta=0.1)
    whole = run(linear_grpo_loss, tensors, given, torch.float64, kind)
    for chunk_rows in (1, 2, 8, 1000):
        parts = run(linear_grpo_loss, tensors, given | {"chunk_rows": chunk_rows}, torch.float64, kind)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_same_inputs_give_the_same_bits():
    tensors, given = draw(6, 7, 8, 257)
    first, second = (run(linear_grpo_loss, tensors, given, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_masked_tokens_may_hold_anything():
    tensors, given = draw(4, 6, 8, 33)
    expected = run(linear_grpo_loss, tensors, given, torch.float32)
    dropped = tensors[4] == 0
    hidden = tensors[0].masked_fill(dropped[..., None], torch.nan)
    ids = tensors[2].masked_fill(dropped, -100)
    for a, b in zip(run(linear_grpo_loss, (hidden, tensors[1], ids, *tensors[3:]), given, torch.float32), expected, strict=True):
        assert torch.equal(a, b)


def test_a_nan_is_not_hidden():
    tensors, given = draw(4, 6, 8, 33)
    hidden = tensors[0].clone()
    hidden[1, 0, 0] = torch.nan
    for kind in (PLAIN, GRPOLoss("cispo", epsilon_high=1.2), BY_SEQUENCE):
        loss, grad_hidden, grad_weight = run(linear_grpo_loss, (hidden, *tensors[1:]), given, torch.float32, kind)
        assert loss.isnan() and grad_hidden[1, 0].isnan().all() and grad_weight.isnan().all()


@pytest.mark.parametrize("kind", [PLAIN, BY_SEQUENCE])
def test_all_masked_is_zero_without_nan(kind):
    tensors, _ = draw(3, 4, 8, 33)
    tensors = (*tensors[:4], torch.zeros(3, 4))
    for value in run(linear_grpo_loss, tensors, {}, torch.float32, kind):
        assert not value.any()


def test_on_policy_gradient_is_that_of_equal_old_logprobs():
    tensors, given = draw(4, 6, 8, 33)
    given["old_logprobs"] = None
    ours = run(linear_grpo_loss, tensors, given, torch.float64)
    exact = run(linear_grpo_loss_reference, tensors, given, torch.float64)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_frozen_head_and_no_grad_make_no_gradient(monkeypatch):
    (hidden, weight, *rest), given = draw(4, 6, 8, 33)
    products = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append("dhidden") or torch.matmul(a, b))
    monkeypatch.setattr("kernels.linear_grpo.add_outer", lambda *_: products.append("dweight"))
    with torch.no_grad():
        linear_grpo_loss(hidden.requires_grad_(), weight.requires_grad_(), *rest, PLAIN, **given)
    assert products == []
    loss, logprobs, _ = linear_grpo_loss(hidden, weight.detach(), *rest, PLAIN, **given)
    assert products == ["dhidden"] and loss.requires_grad and not logprobs.requires_grad


def test_backward_scales_and_runs_once():
    (hidden, weight, *rest), given = draw(4, 6, 8, 33)
    tensors = (hidden, weight, *rest)
    once = run(linear_grpo_loss, tensors, given, torch.float32)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss, _, _ = linear_grpo_loss(hidden, weight, *rest, PLAIN, **given)
    (loss * 4).backward(retain_graph=True)
    assert torch.equal(hidden.grad.double(), 4 * once[1]) and torch.equal(weight.grad.double(), 4 * once[2])
    with pytest.raises(RuntimeError, match="linear_grpo_loss has one backward: .* call it again"):
        loss.backward()


def test_logits_of_one_chunk_at_a_time(monkeypatch):
    """No tensor is larger than a chunk of logits or dweight."""
    tensors, given = draw(8, 16, 4, 1000)
    sizes, empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, size, **k: sizes.append(size) or empty(x, size, **k))
    run(linear_grpo_loss, tensors, given | {"chunk_rows": 16}, torch.float32)
    largest = max(torch.Size(size).numel() for size in sizes if isinstance(size, tuple))
    assert (16, 1000) in sizes and largest <= 2 * 16 * 1000


def test_entropy_mask_from_a_first_pass_equals_autograd():
    (hidden, weight, ids, advantages, mask), given = draw(4, 6, 8, 33)
    _, entropy = linear_logprob_reference(hidden.flatten(0, 1), weight, ids.flatten())
    keep = (entropy.view(mask.shape) >= entropy.view(mask.shape)[mask.bool()].quantile(0.8)).float()
    hidden = hidden.requires_grad_()
    loss, _, _ = linear_grpo_loss(hidden, weight, ids, advantages, mask, KL, policy_mask=keep, **given)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    logprobs, _ = linear_logprob_reference(exact.flatten(0, 1), weight.double(), ids.flatten())
    grpo_loss_reference(logprobs.view(mask.shape), advantages, mask, KL, policy_mask=keep, **given).backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_named():
    (hidden, weight, ids, advantages, mask), _ = draw(4, 6, 8, 33)
    for message, arguments in (
        (r"hidden and weight must be \(B, T, H\) and \(V, H\)", (hidden.flatten(0, 1), weight, ids, advantages, mask)),
        (r"target_ids must be \(4, 6\), not \(24,\)", (hidden, weight, ids.flatten(), advantages, mask)),
        (r"mask must be \(4, 6\), not \(4, 5\)", (hidden, weight, ids, advantages, mask[:, :5])),
        (r"advantages must be \(4,\), not \(4, 1\)", (hidden, weight, ids, advantages[:, None], mask)),
    ):
        with pytest.raises(ValueError, match=message):
            linear_grpo_loss(*arguments, PLAIN)
    with pytest.raises(ValueError, match="ref_logprobs must be given"):
        linear_grpo_loss(hidden, weight, ids, advantages, mask, KL)
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_grpo_loss(hidden, weight, ids, advantages, mask, PLAIN, temperature=-1.0)
    with pytest.raises(ValueError, match="hidden must be bfloat16, float32 or float64"):
        linear_grpo_loss(hidden.half(), weight.half(), ids, advantages, mask, PLAIN)


@pytest.mark.triton
def test_triton_body_equals_golden_cases(golden):
    cases = [case for case in loss_cases(golden) if "tis" not in case.name and not case.name.startswith(("bnpo", "dr_grpo"))]
    assert len(cases) == 24
    for case in cases:  # a third of a second each
        assert_golden(case, *run_golden(case, torch.float32), tolerance=2e-6)


@pytest.mark.triton
@each_variant
def test_triton_body_is_as_exact_as_eager(variant):
    check((4, 5, 16, 257), variant, num_rows=11)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(2, 3, 8, 1000), (1, 1, 8, 33), (3, 1, 8, 151936)])
def test_triton_body_on_odd_shapes(shape):
    check(shape, KL, temperature=0.7, draws=8 if shape[3] > 100_000 else 1)


@pytest.mark.triton
def test_triton_body_on_masked_tokens():
    test_masked_tokens_may_hold_anything()
    test_all_masked_is_zero_without_nan(PLAIN)
    test_all_masked_is_zero_without_nan(BY_SEQUENCE)
    test_a_nan_is_not_hidden()
    test_same_inputs_give_the_same_bits()
