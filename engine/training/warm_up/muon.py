"""Muon (Keller Jordan, 2024) in float32: momentum whose singular values are all made about 1.

    m <- mu m + (1 - mu) g        u = (1 - mu) g + mu m        W <- W - lr sqrt(max(1, rows / columns)) orthogonal(u)

`torch.optim.Muon` does the products in bfloat16, which takes ten times as long on a CPU that has no instructions for it. Here
matrices of one shape are made orthogonal together.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of the quintic that drives singular values towards 1


class Muon(torch.optim.Optimizer):
    """For matrices [rows, columns] that have a gradient."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    same_shape.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in same_shape.items():
                directions = orthogonal(torch.stack([self._look_ahead(m, group["momentum"]) for m in matrices]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.add_(direction, alpha=-rate)

    def _look_ahead(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's momentum, in float32."""
        gradient = matrix.grad.float()  # type: ignore[union-attr]
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        mean = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, rows, columns] -> the same with singular values between about 0.7 and 1.2, by Newton and Schulz's iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        squares = x @ x.mT
        x = a * x + (b * squares + c * squares @ squares) @ x
    return x.mT if tall else x
