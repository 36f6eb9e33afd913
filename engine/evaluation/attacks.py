"""Attacks on images: small changes that raise a loss most, by its gradient's sign (FGSM, PGD).

    FGSM  x' = x + epsilon sign(grad L(x))                                                     arXiv:1412.6572
    PGD   x_k+1 = clip(x_k + alpha sign(grad L(x_k)), x - epsilon, x + epsilon)                 arXiv:1706.06083

all within 0-1, and in the end rounded towards x to the 256 levels of an image file: what the model is shown is an image that can be
kept and sent, and none of its pixels is further from the original than epsilon.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.rollout.policy import Policy, PromptBatch

LEVELS = 255
ROUNDING = 1e-3  # of a level: what float32 may take from a whole number of levels


@dataclass(frozen=True)
class Attack:
    """`epsilon`: the largest change of a pixel, `alpha`: the change of a step, both in 0-1 (8 / 255 is common); `steps` of them.

    `scale` (3, 1, 1) multiplies both for each channel: the unit is then not the whole range but, say, its standard deviation.
    """

    epsilon: float
    alpha: float
    steps: int
    scale: Tensor | None = None

    @classmethod
    def named(cls, name: str, epsilon: float, alpha: float, steps: int, scale: Tensor | None = None) -> "Attack":
        """`name` is fgsm (one step of epsilon) or pgd."""
        if name not in ("fgsm", "pgd"):
            raise ValueError(f"attack is fgsm or pgd, not {name!r}")
        return cls(epsilon, epsilon, 1, scale) if name == "fgsm" else cls(epsilon, alpha, steps, scale)

    def __call__(self, images: list[Tensor], loss_of: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
        """Images (.., 3, h, w) in 0-1 -> the attacked ones. `loss_of(images)` is one number, a sum over images that do not depend
        on each other."""
        scale = 1.0 if self.scale is None else self.scale.to(images[0])
        epsilon, alpha = self.epsilon * scale, self.alpha * scale
        changed = images
        for _ in range(self.steps):
            leaves = [x.detach().requires_grad_() for x in changed]
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss_of(leaves), leaves)
            steps = [x + alpha * gradient.sign() for x, gradient in zip(changed, gradients, strict=True)]
            changed = [clip(x, y, epsilon) for x, y in zip(images, steps, strict=True)]
        return [to_levels(x, y) for x, y in zip(images, changed, strict=True)]


def clip(x: Tensor, y: Tensor, epsilon: Tensor | float) -> Tensor:
    """y brought to within `epsilon` of x, and into 0-1."""
    return torch.minimum(torch.maximum(y, x - epsilon), x + epsilon).clamp(0, 1)


def to_levels(x: Tensor, y: Tensor) -> Tensor:
    """y at whole levels, rounded towards x, which is at whole levels already."""
    change = (y - x) * LEVELS
    return ((x * LEVELS).round() + (change + ROUNDING * change.sign()).trunc()) / LEVELS


def target_loss(policy: Policy, batch: PromptBatch, targets: list[list[int]]) -> Tensor:
    """Sum of -log p(target | prompt) over B prompts and their targets' token ids; differentiable in the batch's images."""
    ids = torch.full((len(targets), max(map(len, targets))), policy.pad_token_id)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for i, target in enumerate(targets):
        ids[i, : len(target)] = torch.tensor(target)
        counted[i, : len(target)] = True
    ids, counted = ids.to(policy.device), counted.to(policy.device)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden[counted] @ weight.t()).float(), ids[counted], reduction="sum")

    return policy.model(**policy.answer_inputs(batch, ids[:, None]), head=head)
