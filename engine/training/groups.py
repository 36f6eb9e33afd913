"""Groups: a prompt, its G sampled answers, their rewards and advantages. One step of GRPO learns from a few of them.

Letters: G answers a prompt, N answers in all, F reward functions, T tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.rollout.policy import Processor
from engine.rollout.sampler import Sampler
from engine.seeds import derive_seed
from engine.tasks.task import Task
from engine.training.config.grpo import GRPOConfig
from kernels.group_advantage import group_advantages

NOT_COLUMNS = ("images", "index", "prompt", "encoded")  # of a row: what its rewards do not get


@dataclass
class Group:
    """Answers to one row of `EncodedRows`.

    completion_ids, completion_mask (G, T) as sampled; truncated (G,); rewards (G, F), NaN where a function gave None;
    advantages (G,).
    """

    row: dict
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    truncated: torch.Tensor
    texts: list[str]
    rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class GroupSampler:
    """Samples answers to rows and scores them."""

    def __init__(self, sampler: Sampler, processor: Processor, task: Task, args: GRPOConfig):
        self.sampler, self.processor, self.task, self.args = sampler, processor, task, args
        self.names = [f.__name__ for f in task.rewards]
        weights = args.reward_weights or task.reward_weights or [1.0] * len(self.names)
        if len(weights) != len(self.names):
            raise ValueError(f"reward_weights has {len(weights)} weights for {len(self.names)} reward functions")
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
        self._score(groups)
        self.seconds["rollout"] += sampled_at - start
        self.seconds["reward"] += time.perf_counter() - sampled_at
        return groups

    def _score(self, groups: list[Group]) -> None:
        """Call every reward function once on all answers, with each column of the rows repeated G times, as TRL does."""
        G = self.args.num_generations
        rows = [group.row for group in groups for _ in range(G)]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in NOT_COLUMNS}
        prompts = [row["prompt"] for row in rows]
        texts = [text for group in groups for text in group.texts]
        scores = []
        for function in self.task.rewards:
            values = function(prompts=prompts, completions=texts, **columns)
            if len(values) != len(texts):
                raise ValueError(f"reward function {function.__name__} gave {len(values)} rewards for {len(texts)} answers")
            scores.append(torch.tensor([float("nan") if value is None else float(value) for value in values]))
        for group, rewards in zip(groups, torch.stack(scores, 1).split(G), strict=True):
            group.rewards = rewards

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
