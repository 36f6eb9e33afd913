"""Attacks on images: small changes that raise a loss most, by its gradient's sign (FGSM, PGD).

    FGSM  x' = x + epsilon sign(grad L(x))                                                     arXiv:1412.6572
    PGD   x_k+1 = clip(x_k + alpha sign(grad L(x_k)), x - epsilon, x + epsilon)                 arXiv:1706.06083

all within 0-1. Of the images that PGD comes by, the one with the highest loss counts, which need not be the last. In the end it is
rounded towards x to the 256 levels of an image file: what the model is shown is an image that can be kept and sent, and none of its
pixels is further from the original than epsilon.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    `best`: of several steps each image keeps the one with the highest loss, otherwise the last.
    """

    epsilon: float
    alpha: float
    steps: int
    scale: Tensor | None = None
    best: bool = True

    @classmethod
    def named(cls, name: str, epsilon: float, alpha: float, steps: int, **more: Any) -> "Attack":
        """`name` is fgsm (one step of epsilon) or pgd; `more`: scale, best."""
        if name not in ("fgsm", "pgd"):
            raise ValueError(f"attack is fgsm or pgd, not {name!r}")
        return cls(epsilon, epsilon, 1, **more) if name == "fgsm" else cls(epsilon, alpha, steps, **more)

    def __call__(self, images: list[Tensor], loss_of: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
        """n images (.., 3, h, w) in 0-1 -> the attacked ones. `loss_of(images)` (n,) is the loss of each; that of images which are
        shown together is the same number, and no other image enters it."""
        scale = 1.0 if self.scale is None else self.scale.to(images[0])
        epsilon, alpha = self.epsilon * scale, self.alpha * scale
        changed, reached = images, []  # reached: losses and images of the steps
        for step in range(self.steps):
            leaves = [x.detach().requires_grad_() for x in changed]
            with torch.enable_grad():
                losses = loss_of(leaves)
                gradients = torch.autograd.grad(losses.sum(), leaves)
            if step and self.best:
                reached.append((losses.detach(), changed))
            steps = [x + alpha * gradient.sign() for x, gradient in zip(changed, gradients, strict=True)]
            changed = [clip(x, y, epsilon) for x, y in zip(images, steps, strict=True)]
        if self.best and self.steps > 1:
            with torch.no_grad():
                reached.append((loss_of(changed), changed))
            highest = torch.stack([losses for losses, _ in reached]).argmax(0).tolist()
            changed = [reached[step][1][i] for i, step in enumerate(highest)]
        return [to_levels(x, y) for x, y in zip(images, changed, strict=True)]


def clip(x: Tensor, y: Tensor, epsilon: Tensor | float) -> Tensor:
    """y brought to within `epsilon` of x, and into 0-1."""
    return torch.minimum(torch.maximum(y, x - epsilon), x + epsilon).clamp(0, 1)


def to_levels(x: Tensor, y: Tensor) -> Tensor:
    """y at whole levels, rounded towards x, which is at whole levels already."""
    change = (y - x) * LEVELS
    return ((x * LEVELS).round() + (change + ROUNDING * change.sign()).trunc()) / LEVELS


def target_losses(policy: Policy, batch: PromptBatch, targets: list[list[int]]) -> Tensor:
    """(B,): -log p(target | prompt) of B prompts and their targets' token ids; differentiable in the batch's images."""
    ids = torch.full((len(targets), max(map(len, targets))), policy.pad_token_id)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for i, target in enumerate(targets):
        ids[i, : len(target)] = torch.tensor(target)
        counted[i, : len(target)] = True
    ids, counted = ids.to(policy.device), counted.to(policy.device)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = F.cross_entropy((hidden[counted] @ weight.t()).float(), ids[counted], reduction="none")
        return torch.zeros(counted.shape, device=losses.device).masked_scatter(counted, losses).sum(1)

    return policy.model(**policy.answer_inputs(batch, ids[:, None]), head=head)
