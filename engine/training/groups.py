"""Groups: a prompt, its G sampled answers, their rewards and advantages. One step of GRPO learns from a few of them.

Letters: G answers a prompt, N answers in all, F reward functions, T tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.errors import InputError
from engine.rollout.policy import Processor
from engine.rollout.sampler import Sampler
from engine.seeds import derive_seed
from engine.tasks.rewards import RewardFunctions
from engine.tasks.task import Task
from engine.training.config.grpo import GRPOConfig
from kernels.group_advantage import group_advantages


@dataclass
class Group:
    """Answers to one row of `EncodedRows`.

    completion_ids, completion_mask (G, T) as sampled; truncated (G,); rewards (G, F), NaN where a function gave None;
    advantages (G,); extra: what reward functions logged about each answer, a list (G) a column.
    """

    row: dict
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    truncated: torch.Tensor
    texts: list[str]
    rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    extra: dict[str, list] = field(default_factory=dict)


class GroupSampler:
    """Samples answers to rows and scores them. `state()` is the trainer's state, for reward functions."""

    def __init__(self, sampler: Sampler, processor: Processor, task: Task, args: GRPOConfig, state: Callable[[], Any]):
        self.sampler, self.processor, self.args, self.state = sampler, processor, args, state
        self.rewards = RewardFunctions(task.rewards)
        self.names = self.rewards.names
        weights = args.reward_weights or task.reward_weights or [1.0] * len(self.names)
        if not self.names or len(weights) != len(self.names):
            raise InputError(f"--reward_weights: {len(weights)} weights for {len(self.names)} reward functions (at least one)")
        self.weights = torch.tensor(weights)
        self.seconds = {"rollout": 0.0, "reward": 0.0}

    def sample(self, rows: list[dict], step: int, round: int = 0) -> list[Group]:
        """One group a row. Randomness follows from the seed, the step, the round and the row alone."""
        start = time.perf_counter()
        args, G = self.args, self.args.num_generations
        sampled = self.sampler.sample(
            [row["encoded"] for row in rows],
            args.sampling,
            num_answers=G,
            max_new_tokens=args.max_completion_length,
            seeds=[derive_seed(args.seed, step, round, row["index"]) for row in rows],
        )
        texts = sampled.texts(self.processor)
        groups = []
        for i, row in enumerate(rows):
            own = slice(i * G, (i + 1) * G)
            ids, mask, cut = sampled.completion_ids[own], sampled.completion_mask[own], sampled.truncated[own]
            groups.append(Group(row, ids, mask, cut, texts[own]))
        sampled_at = time.perf_counter()
        self._score(groups, step)
        self.seconds["rollout"] += sampled_at - start
        self.seconds["reward"] += time.perf_counter() - sampled_at
        return groups

    def _score(self, groups: list[Group], step: int) -> None:
        """Call every reward function once on all answers."""
        G = self.args.num_generations
        lengths = [group.completion_mask.sum(1).tolist() for group in groups]
        ids = [group.completion_ids.tolist() for group in groups]
        rewards = self.rewards(
            [group.row for group in groups for _ in range(G)],
            [text for group in groups for text in group.texts],
            [row[:length] for rows, own in zip(ids, lengths, strict=True) for row, length in zip(rows, own, strict=True)],
            step=step + 1,
            state=self.state(),
        )
        for i, (group, own) in enumerate(zip(groups, rewards.split(G), strict=True)):
            group.rewards = own
            group.extra = {column: values[i * G : (i + 1) * G] for column, values in self.rewards.extra.items()}

    def total(self, groups: list[Group]) -> torch.Tensor:
        """Weighted reward of each answer, (N,); NaN where no function scored it."""
        rewards = torch.cat([group.rewards for group in groups])
        total = (rewards * self.weights).nansum(1)
        return total.masked_fill(rewards.isnan().all(1), float("nan"))

    def is_flat(self, group: Group) -> bool:
        """All rewards equal: the group teaches nothing."""
        rewards = self.total([group])
        rewards = rewards[~rewards.isnan()]
        return rewards.numel() == 0 or bool((rewards == rewards[0]).all())

    def set_advantages(
        self, groups: list[Group], gather: Callable[[torch.Tensor], torch.Tensor], rank: int, device: torch.device
    ) -> torch.Tensor:
        """Set the advantages of every group and return the weighted rewards (N,).

        `gather` collects tensors (N,) on `device` from all processes, which `scale_rewards="batch"` needs; this one is `rank`.
        """
        rewards = self.total(groups)
        if self.args.scale_rewards == "batch":
            everyone = gather(rewards.to(device)).cpu()
            advantages = group_advantages(everyone, self.args.num_generations, scale_rewards="batch")
            advantages = advantages[rank * len(rewards) : (rank + 1) * len(rewards)]
        else:
            advantages = group_advantages(rewards, self.args.num_generations, scale_rewards=self.args.scale_rewards)
        for group, own in zip(groups, advantages.split(self.args.num_generations), strict=True):
            group.advantages = own
        return rewards
