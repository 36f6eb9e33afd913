"""Muon in float32: torch's, but for the bfloat16 of its products."""

import pytest
import torch

from engine.training.warm_up.muon import Muon, orthogonal

SHAPES = [(48, 16), (16, 16), (16, 48)]


def test_steps_are_those_of_torch_within_bfloat16():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES * 2]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    optimizers = [Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.0)]
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        before = [matrix.detach().clone() for matrix in ours]
        for optimizer in optimizers:
            optimizer.step()
        for old, mine, other in zip(before, ours, theirs, strict=True):
            assert (mine - old).norm() > 0.1
            torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_keep_the_singular_vectors_and_lose_the_values(shape):
    torch.manual_seed(1)
    left, values, right = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    made = torch.linalg.svdvals(orthogonal(left @ torch.diag_embed(values.clamp(min=0.2)) @ right))
    assert made.min() > 0.6 and made.max() < 1.25
    aligned = left.mT @ orthogonal(left @ torch.diag_embed(values) @ right) @ right.mT
    off = aligned - torch.diag_embed(torch.diagonal(aligned, dim1=1, dim2=2))
    assert off.abs().max() < 1e-9


def test_a_matrix_without_a_gradient_stays():
    still, moved = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    moved.grad = torch.eye(4)
    Muon([still, moved], 0.1).step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moved, torch.ones(4, 4))
