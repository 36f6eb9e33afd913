"""The loss from log-probs against TRL's values, gradients and metrics, and against its own reference."""

from dataclasses import replace

import pytest
import torch

from kernels.grpo_loss import grpo_loss, grpo_loss_reference
from kernels.grpo_terms import LOSS_TYPES, GRPOLoss
from tests.kernels.golden_cases import loss_cases, read

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value"),  # numpy, in the interpreter
]


def assert_golden(case, loss, gradient, metrics, tolerance):
    """Loss and gradient within `tolerance` relative, the loss also absolutely: its terms cancel; the metrics are float32."""
    assert abs(loss - case.value) <= tolerance * max(abs(case.value), 0.1), case.name
    error = (gradient - case.gradient).norm() / case.gradient.norm().clamp(min=1e-12)
    assert error <= tolerance, f"{case.name}: gradient off by {error:.1e}"
    for name, value in case.metrics.items():
        assert metrics[name].item() == pytest.approx(value, abs=1e-6), f"{case.name}: {name}"
    assert set(metrics) <= set(case.metrics or metrics), case.name


def run_golden(case, dtype):
    logits = case.logits.clone().requires_grad_()
    logprobs, entropies = case.logprobs(logits)
    tensors = {key: x.to(dtype) if isinstance(x, torch.Tensor) else x for key, x in case.given.items()}
    advantages, entropies = case.advantages.to(dtype), entropies.detach().to(dtype)
    loss, metrics = grpo_loss(logprobs.to(dtype), advantages, case.mask, case.loss, entropies=entropies, **tensors)
    loss.backward()
    return loss.item(), logits.grad, metrics


def test_every_golden_case(golden):
    cases = list(loss_cases(golden))
    assert len(cases) == 41
    for case in cases:
        assert_golden(case, *run_golden(case, torch.float64), tolerance=1e-6)


def test_reference_equals_every_golden_case(golden):
    for case in loss_cases(golden):
        logits = case.logits.clone().requires_grad_()
        loss = grpo_loss_reference(case.logprobs(logits)[0], case.advantages, case.mask, case.loss, **case.given)
        loss.backward()
        torch.testing.assert_close(logits.grad, case.gradient, rtol=1e-9, atol=1e-12)
        assert loss.item() == pytest.approx(case.value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_equals_the_published_loss_of_med_r1(golden, beta):
    arrays, _ = read(golden)
    case = next(case for case in loss_cases(golden) if case.name == f"trl_medr1_equiv_beta{beta}")
    loss, gradient, _ = run_golden(case, torch.float64)
    assert loss == pytest.approx(arrays[f"medr1_loss_beta{beta}/loss"].item(), abs=1e-12)
    torch.testing.assert_close(gradient, arrays[f"medr1_loss_beta{beta}/grad_logits"][:, 2:-1], rtol=1e-9, atol=1e-12)


def draw(rows, tokens, seed=0):
    """Seeded (logprobs, advantages, mask, given) with every optional tensor, one row masked and one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, tokens, generator=generator) * 4
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)).long()
    mask[0] = rows == 1
    mask[-1, 1:] = 0
    old = logprobs + 0.3 * torch.randn(rows, tokens, generator=generator)
    ref = logprobs + 0.3 * torch.randn(rows, tokens, generator=generator)
    policy = torch.rand(rows, tokens, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    return logprobs, advantages, mask, {"old_logprobs": old, "ref_logprobs": ref, "policy_mask": policy, "num_items": 17.0}


def variants():
    """Every loss type at both levels, with and without bias correction of the KL, all options on."""
    for loss_type in LOSS_TYPES:
        for level in ("token", "sequence"):
            for bias in (False, True):
                high = 1.2 if loss_type == "cispo" else 0.28
                yield GRPOLoss(
                    loss_type,
                    importance_sampling_level=level,
                    use_bias_correction_kl=bias,
                    beta=0.1,
                    delta=1.4,
                    epsilon_high=high,
                    max_completion_length=9,
                )


each_variant = pytest.mark.parametrize(
    "variant",
    [pytest.param(v, id=f"{v.loss_type}-{v.importance_sampling_level}-{v.use_bias_correction_kl}") for v in variants()],
)


def check_variant(variant, rows, tokens):
    logprobs, advantages, mask, given = draw(rows, tokens)
    ours = logprobs.clone().requires_grad_()
    loss, metrics = grpo_loss(ours, advantages, mask, variant, num_rows=11, **given)
    loss.backward()
    exact = logprobs.double().requires_grad_()
    given = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    truth = grpo_loss_reference(exact, advantages.double(), mask, variant, num_rows=11, **given)
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2e-5, atol=2e-7)
    assert all(value.isfinite() for value in metrics.values())


@each_variant
@pytest.mark.parametrize("shape", [(5, 33), (1, 1)])
def test_float32_equals_autograd_in_float64(variant, shape):
    check_variant(variant, *shape)


def test_masked_tokens_may_hold_anything():
    logprobs, advantages, mask, given = draw(4, 9)
    clean = logprobs.clone().requires_grad_()
    expected, _ = grpo_loss(clean, advantages, mask, GRPOLoss(beta=0.1), **given)
    expected.backward()
    dirty = logprobs.masked_fill(mask == 0, torch.nan).requires_grad_()
    given = {key: x.masked_fill(mask == 0, torch.inf) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    loss, metrics = grpo_loss(dirty, advantages, mask, GRPOLoss(beta=0.1), **given)
    loss.backward()
    assert torch.equal(loss, expected) and torch.equal(dirty.grad, clean.grad)
    assert all(value.isfinite() for value in metrics.values())


def test_a_nan_is_not_hidden():
    logprobs, advantages, mask, given = draw(4, 9)
    logprobs[1, 0] = torch.nan
    for kind in (GRPOLoss(), GRPOLoss("cispo"), GRPOLoss(importance_sampling_level="sequence")):
        leaf = logprobs.clone().requires_grad_()
        loss, _ = grpo_loss(leaf, advantages, mask, kind, **given)
        loss.backward()
        assert loss.isnan()
        assert kind.is_cispo or leaf.grad[1, 0].isnan()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_all_masked_is_zero_without_nan(loss_type):
    logprobs = torch.randn(3, 4, requires_grad=True)
    loss, metrics = grpo_loss(logprobs, torch.ones(3), torch.zeros(3, 4), GRPOLoss(loss_type, max_completion_length=4))
    loss.backward()
    assert loss == 0 and not logprobs.grad.any()
    assert all(value == 0 for name, value in metrics.items() if not name.endswith(("min", "max")))


def test_rows_left_out_stay_in_the_denominators():
    logprobs, advantages, mask, given = draw(6, 9, seed=1)
    advantages[3:] = 0
    for loss_type in ("grpo", "dr_grpo"):
        kind, old = GRPOLoss(loss_type, max_completion_length=9), given["old_logprobs"]
        whole, _ = grpo_loss(logprobs, advantages, mask, kind, old_logprobs=old)
        part, _ = grpo_loss(logprobs[:3], advantages[:3], mask[:3], kind, old_logprobs=old[:3], num_rows=6)
        torch.testing.assert_close(whole, part)


def test_bad_arguments_are_named():
    x, a, m = torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3)
    for message, settings in (
        ("loss_type must be one of grpo, .*, not 'sapo'", {"loss_type": "sapo"}),
        ("importance_sampling_level must be one of token, sequence", {"importance_sampling_level": "word"}),
        ("max_completion_length must be given", {"loss_type": "dr_grpo"}),
    ):
        with pytest.raises(ValueError, match=message):
            GRPOLoss(**settings)
    for loss in (grpo_loss, grpo_loss_reference):
        with pytest.raises(ValueError, match="ref_logprobs must be given"):
            loss(x, a, m, GRPOLoss(beta=0.1))
    with pytest.raises(ValueError, match=r"old_logprobs must be \(2, 3\), not \(2, 2\)"):
        grpo_loss(x, a, m, GRPOLoss(), old_logprobs=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"advantages must be \(2,\), not \(3,\)"):
        grpo_loss(x, torch.zeros(3), m, GRPOLoss())


@each_variant
def test_the_ops_read_the_loss_that_was_written(variant):
    assert GRPOLoss.of_text(variant.text) == variant
    exact = replace(variant, epsilon=0.1 + 0.2, delta=None, epsilon_high=float("inf"))
    assert GRPOLoss.of_text(exact.text) == exact and exact.text != variant.text


@pytest.mark.triton
def test_triton_body_equals_every_golden_case(golden):
    for case in loss_cases(golden):
        assert_golden(case, *run_golden(case, torch.float32), tolerance=1e-6)


@pytest.mark.triton
@each_variant
def test_triton_body_equals_autograd_in_float64(variant):
    check_variant(variant, 5, 140)
    check_variant(variant, 1, 1)


@pytest.mark.triton
def test_triton_body_on_masked_and_long_rows():
    test_masked_tokens_may_hold_anything()
    test_all_masked_is_zero_without_nan("grpo")
    test_a_nan_is_not_hidden()
    check_variant(GRPOLoss(beta=0.1), 34, 1100)


@pytest.mark.triton
def test_triton_body_gives_the_same_bits_twice():
    logprobs, advantages, mask, given = draw(40, 65)
    first, second = (grpo_loss(logprobs, advantages, mask, GRPOLoss(beta=0.1), **given) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
