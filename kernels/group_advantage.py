"""Group-relative advantages of GRPO: rewards centred on their group's mean, scaled by the group's or the batch's deviation.

    A_i = (r_i - mean_g(r)) / (std(r) + eps)        std over the group ("group"), over all rewards ("batch"), or no division

N rewards in rows of G consecutive generations (N = P * G). Deviations are unbiased (ddof 1). NaN marks a completion that no
reward function scored: it is left out of mean and deviation and its advantage is 0, as is that of a group without two scores
where a deviation is needed. Equal rewards give exact zeros, which the trainer skips: the group's largest is taken off first.
No gradient flows through advantages.

8 bytes a reward; the whole op is one launch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.language import tl, triton
from kernels.launch import LaunchConfig, launch, padded_power, runs_triton, triton_op

SCALES = ("group", "batch", "none")
# Rewards a program holds at once: two warps of eight groups of eight.
TILE = 64


def group_advantages_reference(rewards: Tensor, num_generations: int, *, scale_rewards: str = "group", eps: float = 1e-4) -> Tensor:
    """The specification of `group_advantages`, in the dtype of `rewards`."""

    def deviation(x: Tensor) -> Tensor:
        count = (~x.isnan()).sum(-1, keepdim=True)
        return ((x - x.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True) / (count - 1)).sqrt()

    grouped = rewards.reshape(-1, num_generations)
    grouped = grouped - grouped.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    advantages = grouped - grouped.nanmean(-1, keepdim=True)
    if scale_rewards != "none":
        population = grouped if scale_rewards == "group" else rewards.reshape(1, -1)
        advantages = advantages / (deviation(population) + eps if population.shape[-1] > 1 else eps)
    return advantages.nan_to_num(nan=0.0).flatten()


@triton.jit
def _advantages_kernel(
    rewards, advantages, num_groups, num_generations, eps, SCALE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    # Rewards of GROUPS groups as a [GROUPS, WIDTH] tile, WIDTH the power of two above num_generations
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (group < num_groups) & (column < num_generations)
    offsets = group * num_generations + column
    reward = tl.load(rewards + offsets, mask=inside, other=float("nan")).to(tl.float32)
    scored = reward == reward
    count = tl.sum(scored.to(tl.float32), 1)[:, None]
    reward -= tl.max(tl.where(scored, reward, float("-inf")), 1)[:, None]
    centred = reward - tl.sum(tl.where(scored, reward, 0.0), 1)[:, None] / count
    if SCALE == "group":
        deviation = tl.sqrt(tl.sum(tl.where(scored, centred * centred, 0.0), 1)[:, None] / (count - 1))
        centred = centred / (deviation + eps)
    if SCALE == "batch":
        # every program reads all rewards: a few kilobytes, against a second launch
        flat = tl.arange(0, GROUPS * WIDTH)
        total = num_groups * num_generations
        counts = tl.zeros([GROUPS * WIDTH], tl.float32)
        sums = tl.zeros([GROUPS * WIDTH], tl.float32)
        for start in range(0, total, GROUPS * WIDTH):
            r = tl.load(rewards + start + flat, mask=start + flat < total, other=float("nan")).to(tl.float32)
            counts += (r == r).to(tl.float32)
            sums += tl.where(r == r, r, 0.0)
        num_scored = tl.sum(counts, 0)
        mean = tl.sum(sums, 0) / num_scored
        squares = tl.zeros([GROUPS * WIDTH], tl.float32)
        for start in range(0, total, GROUPS * WIDTH):
            r = tl.load(rewards + start + flat, mask=start + flat < total, other=float("nan")).to(tl.float32)
            squares += tl.where(r == r, (r - mean) * (r - mean), 0.0)
        centred = centred / (tl.sqrt(tl.sum(squares, 0) / (num_scored - 1)) + eps)
    tl.store(advantages + offsets, tl.where(centred == centred, centred, 0.0), mask=inside)


def _constants(num_generations: int, scale_rewards: str) -> dict[str, Any]:
    width = padded_power(num_generations)
    return {"SCALE": scale_rewards, "GROUPS": max(1, TILE // width), "WIDTH": width, "num_warps": 2}


def launch_configs() -> Iterator[LaunchConfig]:
    """Groups of eight, scaled by group and by batch."""
    rewards = torch.empty(0, device="meta")
    for scale in ("group", "batch"):
        yield LaunchConfig(f"advantages, {scale}", _advantages_kernel, (rewards, rewards, 32, 8, 1e-4), _constants(8, scale))


@triton_op("vesalius::group_advantages")
def _group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str, eps: float) -> Tensor:
    if not runs_triton(rewards) or not len(rewards):
        return group_advantages_reference(rewards, num_generations, scale_rewards=scale_rewards, eps=eps)
    advantages = torch.empty_like(rewards)
    constants = _constants(num_generations, scale_rewards)
    num_groups = rewards.shape[0] // num_generations
    grid = (triton.cdiv(num_groups, constants["GROUPS"]),)
    launch(_advantages_kernel, grid, rewards, advantages, num_groups, num_generations, eps, **constants)
    return advantages


def group_advantages(rewards: Tensor, num_generations: int, *, scale_rewards: str = "group", eps: float = 1e-4) -> Tensor:
    """Advantages of (N,) rewards, groups of `num_generations` consecutive ones; (N,) float32.

    Raises ValueError where N is no multiple of `num_generations` or `scale_rewards` is not "group", "batch" or "none".
    As in TRL; eps 1e-4 is the published one.
    """
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards must be one of {', '.join(SCALES)}, not {scale_rewards!r}")
    if rewards.dim() != 1 or num_generations < 1 or rewards.shape[0] % num_generations:
        raise ValueError(f"rewards must be (N,) with N a multiple of num_generations={num_generations}, not {tuple(rewards.shape)}")
    rewards = rewards.detach()
    if rewards.dtype != torch.float64:
        rewards = rewards.float()
    return _group_advantages(rewards.contiguous(), num_generations, scale_rewards, eps)
