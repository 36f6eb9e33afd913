"""Group-relative advantages of GRPO: rewards centred on their group's mean, scaled by the group's or the batch's deviation.

    A_i = (r_i - mean_g(r)) / (std(r) + eps)        std over the group ("group"), over all rewards ("batch"), or no division ("none")

N rewards in rows of G consecutive generations (N = P * G). Deviations are unbiased (ddof 1). NaN marks a completion that no
reward function scored: it is left out of mean and deviation and its advantage is 0, as is that of a group without two scores
where a deviation is needed. No gradient flows through advantages.

8 bytes a reward; the whole op is one launch.
"""

import torch

SCALES = ("group", "batch", "none")


def group_advantages_reference(rewards, num_generations, *, scale_rewards="group", eps=1e-4):
    """The specification of `group_advantages`, in the dtype of `rewards`."""

    def deviation(x):
        count = (~x.isnan()).sum(-1, keepdim=True)
        return ((x - x.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True) / (count - 1)).sqrt()

    grouped = rewards.reshape(-1, num_generations)
    advantages = grouped - grouped.nanmean(-1, keepdim=True)
    if scale_rewards != "none":
        population = grouped if scale_rewards == "group" else grouped.reshape(1, -1)
        advantages = advantages / (deviation(population) + eps if population.shape[-1] > 1 else eps)
    return advantages.nan_to_num(nan=0.0).flatten()


def group_advantages(
    rewards: torch.Tensor, num_generations: int, *, scale_rewards: str = "group", eps: float = 1e-4
) -> torch.Tensor:
    """Advantages of (N,) rewards, groups of `num_generations` consecutive ones; (N,) float32.

    Raises ValueError where N is no multiple of `num_generations` or `scale_rewards` is not "group", "batch" or "none".
    Formula: grpo_systems.md 8.1 (TRL); eps 1e-4 is the published one.
    """
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards must be one of {', '.join(SCALES)}, not {scale_rewards!r}")
    if rewards.dim() != 1 or num_generations < 1 or rewards.shape[0] % num_generations:
        raise ValueError(f"rewards must be (N,) with N a multiple of num_generations={num_generations}, not {tuple(rewards.shape)}")
    rewards = rewards.detach()
    if rewards.dtype != torch.float64:
        rewards = rewards.float()
    return group_advantages_reference(rewards, num_generations, scale_rewards=scale_rewards, eps=eps)
