"""The vision tower by window length against transformers' own call a window: features, gradients and calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.qwen.policy import load_qwen_vl
from models.qwen.vision_windows import WINDOWS_NAME, plan_windows, windowed_attention
from tests.tiny_qwen import save_tiny

# Grids in patches, two of which become a token; a window is 4 x 4 patches here: whole ones, ragged right, below and at both edges,
# smaller than one window, and several images of each kind at once.
GRIDS = [[(8, 8)], [(8, 6)], [(6, 8)], [(10, 14)], [(2, 2)], [(8, 8), (8, 8)], [(10, 6), (8, 8), (6, 10), (10, 6), (2, 12)]]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def tower(request, tmp_path_factory):
    return load_qwen_vl(save_tiny(tmp_path_factory.mktemp("model"), request.param)).base.model.visual


def run(tower, grids, implementation):
    """Features, the gradients of the pixels and of every weight, and the number of SDPA calls."""
    generator = torch.Generator().manual_seed(0)
    thw = torch.tensor([(1, *grid) for grid in grids])
    pixels = torch.randn(int(thw.prod(1).sum()), 3 * 2 * 14 * 14, generator=generator, requires_grad=True)
    calls, attend, before = [], F.scaled_dot_product_attention, tower.config._attn_implementation
    tower.config._attn_implementation = implementation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or attend(*a, **k))
        features = tower(pixels, thw).pooler_output
    tower.config._attn_implementation = before
    seed = torch.randn(features.shape, generator=generator)
    weights = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    return [features, *torch.autograd.grad(features, [pixels, *weights], seed)], len(calls)


def test_it_is_what_a_policy_runs_with(tower):
    assert tower.config._attn_implementation == WINDOWS_NAME


def test_another_implementation_is_left_alone(tmp_path):
    policy = load_qwen_vl(save_tiny(tmp_path), attn_implementation="eager")
    assert policy.base.model.visual.config._attn_implementation == "eager"


@pytest.mark.parametrize("grids", GRIDS)
def test_features_and_gradients_equal_transformers_in_fewer_calls(tower, grids):
    (ours, calls), (theirs, windows) = (run(tower, grids, name) for name in (WINDOWS_NAME, "sdpa"))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
    for mine, exact in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-6 * max(1.0, exact.abs().max().item()), rtol=1e-5)
    assert calls <= windows


def test_calls_are_as_many_as_lengths(tower):
    """In a layer of each kind; transformers makes a call a window (16 and 4 times 9 of one length) and image (5 of two)."""
    grids, in_windows = [(16, 16)] + [(12, 12)] * 4, hasattr(tower, "window_size")
    (_, ours), (_, theirs) = (run(tower, grids, name) for name in (WINDOWS_NAME, "sdpa"))
    assert ours == (1 + 2 if in_windows else 2 + 2) and theirs == (16 + 36 + 5 if in_windows else 5 + 5)


def test_windows_of_any_lengths_attend_to_themselves_alone():
    torch.manual_seed(0)
    ends = torch.tensor([0, 3, 3, 7, 10, 11, 15])  # one of them empty
    query, key, value = (torch.randn(1, 2, 15, 4, dtype=torch.float64) for _ in range(3))
    ours, _ = windowed_attention(nn.Module(), query, key, value, None, scaling=0.7, cu_seq_lens_q=ends)
    window = torch.bucketize(torch.arange(15), ends[1:], right=True)
    mask = window[:, None] == window[None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7).transpose(1, 2)
    torch.testing.assert_close(ours, expected)
    assert plan_windows(ends).groups == [(2, 4), (2, 3), (1, 1)]


@pytest.mark.parametrize("ends", [[0, 3, 3, 7, 10, 11, 15], [0, 15], [0, 4, 8, 12]])
def test_compiled_windows_are_one_graph_and_the_same(ends):
    """Whatever their lengths; one of them is empty."""
    torch.manual_seed(0)
    ends = torch.tensor(ends)
    compiled = torch.compile(windowed_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = [torch.randn(1, 2, int(ends[-1]), 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    results = []
    for attend in (windowed_attention, compiled):
        out, _ = attend(None, *leaves, None, scaling=0.7, cu_seq_lens_q=ends, max_length_q=int(ends.diff().max()))
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(1))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact)


def test_no_patches_give_no_features():
    empty = torch.empty(1, 2, 0, 4)
    ours, _ = windowed_attention(nn.Module(), empty, empty, empty, None, cu_seq_lens_q=torch.tensor([0]))
    assert ours.shape == (1, 0, 2, 4)


def test_a_plan_is_kept_as_long_as_its_ends():
    ends = torch.tensor([0, 4, 8])
    assert plan_windows(ends) is plan_windows(ends) and plan_windows(ends.clone()) is not plan_windows(ends)
