"""Log-probs and entropies of a linear head, outputs and gradients, against float64."""

import pytest
import torch

from kernels import linear_logprob as module
from kernels.linear_logprob import SKIP, linear_logprob, linear_logprob_reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, in the interpreter
]
# (N, H, V): odd vocabularies, a size 1, and that of Qwen
SHAPES = [(7, 16, 257), (5, 8, 1000), (1, 8, 33), (3, 5, 1), (2, 4, 151936)]


def draw(rows, hidden_size, vocabulary, dtype=torch.float32, skipped=()):
    """Seeded (hidden, weight, target_ids) whose logits have a deviation of about 3."""
    generator = torch.Generator().manual_seed(rows * vocabulary)
    hidden = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) * 3 / hidden_size**0.5).to(dtype)
    target_ids = torch.randint(0, vocabulary, (rows,), generator=generator)
    target_ids[list(skipped)] = SKIP
    return hidden, weight, target_ids


def run(head, hidden, weight, target_ids, dtype, **options):
    """Outputs, and the gradients of a weighted sum of both outputs, in float64."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    logprobs, entropy = head(hidden, weight, target_ids, **options)
    gains = torch.randn(2, len(target_ids), generator=torch.Generator().manual_seed(1))
    (gains[0] * logprobs + gains[1] * entropy).sum().backward()
    return [x.detach().double() for x in (logprobs, entropy, hidden.grad, weight.grad)]


def assert_as_exact_as_eager(ours, eager, exact, floor):
    """Relative errors of at most twice those of the eager computation in the same dtype, or of a rounding."""
    for name, mine, theirs, truth in zip(("logprobs", "entropy", "dhidden", "dweight"), ours, eager, exact, strict=True):
        scale = truth.norm().clamp(min=1e-30)
        error, allowed = (mine - truth).norm() / scale, 2 * (theirs - truth).norm() / scale + floor
        assert error <= allowed, f"{name}: {error:.2e} where eager has {(allowed - floor) / 2:.2e}"


def check(shape, dtype=torch.float32, skipped=(), temperature=1.0, **options):
    case = draw(*shape, dtype=dtype, skipped=skipped)
    ours = run(linear_logprob, *case, dtype, temperature=temperature, **options)
    eager = run(linear_logprob_reference, *case, dtype, temperature=temperature)
    exact = run(linear_logprob_reference, *case, torch.float64, temperature=temperature)
    assert_as_exact_as_eager(ours, eager, exact, torch.finfo(dtype).eps)
    return ours


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_as_exact_as_eager(shape):
    check(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_as_exact_as_eager(shape):
    check(shape, dtype=torch.bfloat16)


def test_temperature_and_chunks_and_skipped_rows():
    logprobs, entropy, grad_hidden, _ = check((7, 16, 257), skipped=(0, 4), temperature=0.7, chunk_rows=2)
    for output in (logprobs, entropy, grad_hidden):
        assert not output[[0, 4]].any()


def test_cached_blocks_do_not_change_the_result(monkeypatch):
    whole = check((9, 8, 1000))
    monkeypatch.setattr(module, "CPU_BLOCK_BYTES", 2 * 1000 * 4)
    for block, one in zip(check((9, 8, 1000)), whole, strict=True):
        torch.testing.assert_close(block, one, rtol=1e-6, atol=1e-7)


def test_all_rows_skipped_is_zero():
    assert not any(x.any() for x in check((4, 8, 33), skipped=(0, 1, 2, 3)))


def extreme_logits():
    """Rows of logits through an identity head: huge, huge and equal, with -inf, one certain token, and all equal."""
    lowest = torch.finfo(torch.float32).min
    return torch.tensor(
        [
            [1e30, 0.0, -1e30, 5.0, 1.0],
            [1e30, 1e30, 1e30, 1e30, 1e30],
            [3.0, -torch.inf, 2.0, 1.0, -torch.inf],
            [lowest, lowest, 0.0, lowest, lowest],
            [-1e30, -1e30, -1e30, -1e30, -1e30],
        ]
    )


def check_extreme_logits():
    """Through the passes over a chunk of logits: an infinite weight would already be NaN in the GEMM."""
    logits, ids = extreme_logits(), torch.tensor([0, 3, 0, 2, 1])
    exact = logits.double().requires_grad_()
    every = exact.log_softmax(-1)
    chosen = every.gather(1, ids[:, None])[:, 0]
    p = every.exp()
    entropy = -torch.where(p > 0, p * every, 0.0).sum(-1)
    chosen.sum().backward()
    work = logits.clone()
    *outputs, softmax = module.row_stats(work, ids, 1.0)
    torch.testing.assert_close(outputs[0].double(), chosen.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs[1].double(), entropy.detach(), rtol=1e-6, atol=1e-6)
    module.logit_gradient_(work, ids, 1.0, softmax, torch.ones(5), None)
    torch.testing.assert_close(work.double(), exact.grad, rtol=1e-6, atol=1e-6)
    impossible = module.row_stats(logits[2:3].clone(), torch.tensor([1]), 1.0)
    assert impossible[0] == -torch.inf and impossible[1].isfinite()
    broken = torch.tensor([[1.0, torch.nan, 2.0]])
    assert module.row_stats(broken, torch.tensor([0]), 1.0)[0].isnan()  # a NaN is not hidden


def test_extreme_logits_have_no_nan_where_the_maths_has_none():
    check_extreme_logits()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, ids = draw(4, 8, 33)
    logprobs, _ = linear_logprob(hidden.requires_grad_(), weight, ids)
    logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_autocast_runs_the_head_in_its_dtype():
    hidden, weight, ids = draw(4, 8, 33)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = linear_logprob(hidden, weight, ids)
    expected, _ = linear_logprob(hidden.bfloat16(), weight.bfloat16(), ids)
    assert logprobs.dtype == torch.float32 and torch.equal(logprobs, expected)


def test_bad_arguments_are_named():
    hidden, weight, ids = draw(4, 8, 33)
    with pytest.raises(ValueError, match=r"hidden and weight must be \(N, H\) and \(V, H\), not \(4, 8\) and \(8, 33\)"):
        linear_logprob(hidden, weight.T, ids)
    with pytest.raises(ValueError, match=r"target_ids must be \(4,\), not \(3,\)"):
        linear_logprob(hidden, weight, ids[:3])
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        linear_logprob(hidden, weight, ids, temperature=0)


@pytest.mark.triton
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_bodies_are_as_exact_as_eager(shape, monkeypatch):
    monkeypatch.setattr(module, "TILE_ROWS", 4)
    monkeypatch.setattr(module, "TILE_LOGITS", 4 * (65536 if shape[2] > 65536 else 64))
    check(shape)
    if shape[0] == 7:
        monkeypatch.setattr(module, "STATS_CONSTANTS", {"BLOCK": 64, "STAGES": 2})
        monkeypatch.setattr(module, "GRADIENT_CONSTANTS", {"BLOCK": 64, "STAGES": 2})
        check(shape, skipped=(0, 4), temperature=0.7, chunk_rows=2)


def test_a_tile_of_fewer_rows_has_more_columns_and_no_more_logits():
    for rows, columns in ((2048, 4096), (1024, 8192), (300, 27904), (1, 151936)):
        assert module.tile_columns(rows, 151936) == columns and rows * columns <= module.TILE_LOGITS
    assert module.tile_columns(1, 33) == module.row_stride(33)  # no more than there are


@pytest.mark.triton
def test_triton_bodies_on_skipped_rows_and_extreme_logits():
    test_all_rows_skipped_is_zero()
    check_extreme_logits()
