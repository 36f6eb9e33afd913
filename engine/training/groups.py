"""Groups: a prompt, its G sampled answers, their rewards and advantages. One step of GRPO learns from a few of them.

Letters: G answers a prompt, N answers in all, F reward functions, T tokens.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.rollout.policy import Policy, PromptBatch
from engine.rollout.rollout import rollout
from engine.training.grpo_config import GRPOConfig
from kernels.group_advantage import group_advantages


@dataclass
class Group:
    """Answers to one dataset row.

    completion_ids, completion_mask (G, T) as sampled; rewards (G, F), NaN where a function gave None; truncated (G,).
    """

    row: dict
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    truncated: torch.Tensor
    texts: list[str]
    rewards: torch.Tensor
    advantages: torch.Tensor | None = None

    def as_sample(self, names: list[str], step: int) -> dict:
        """What a report shows of it."""
        answers = [
            {"text": text, "rewards": dict(zip(names, rewards, strict=True)), "advantage": advantage}
            for text, rewards, advantage in zip(self.texts, self.rewards.tolist(), self.advantages.tolist(), strict=True)
        ]
        return {
            "step": step,
            "image": self.row["images"][0] if self.row.get("images") else None,
            "question": self.row.get("problem", ""),
            "solution": self.row.get("solution", ""),
            "completions": answers,
        }


class GroupSampler:
    """Samples answers to dataset rows and scores them."""

    def __init__(self, policy: Policy, reward_funcs: list[Callable], prompt_of: Callable[[dict], list[dict]], args: GRPOConfig):
        self.policy, self.reward_funcs, self.prompt_of, self.args = policy, reward_funcs, prompt_of, args
        weights = args.reward_weights or [1.0] * len(reward_funcs)
        if len(weights) != len(reward_funcs):
            raise ValueError(f"reward_weights has {len(weights)} weights for {len(reward_funcs)} reward functions")
        self.weights = torch.tensor(weights)
        self.names = [f.__name__ for f in reward_funcs]
        self.seconds = {"rollout": 0.0, "reward": 0.0}

    def encode(self, rows: list[dict]) -> PromptBatch:
        prompts = [self.prompt_of(row) for row in rows]
        return self.policy.encode(prompts, [row["images"] for row in rows], [row.get("image_id") for row in rows])

    def sample(self, rows: list[dict], batch: PromptBatch, step: int, round: int = 0) -> list[Group]:
        """One group a row. Randomness follows from the seed, the step, the round and the row alone."""
        start = time.perf_counter()
        args, limit = self.args, self.args.rollout_batch_size or len(rows)
        groups = []
        for first in range(0, len(rows), limit):
            part = list(range(first, min(first + limit, len(rows))))
            sampled = rollout(
                self.policy,
                batch.select(part) if len(part) < len(rows) else batch,
                args.sampling,
                num_generations=args.num_generations,
                max_new_tokens=args.max_completion_length,
                seeds=[row_seed(args.seed, step, round, rows[i]["index"]) for i in part],
            )
            texts = sampled.texts(self.policy.processor)
            for n, i in enumerate(part):
                own = slice(n * args.num_generations, (n + 1) * args.num_generations)
                ids, mask, cut = sampled.completion_ids[own], sampled.completion_mask[own], sampled.truncated[own]
                groups.append(Group(rows[i], ids, mask, cut, texts[own], torch.empty(0)))
        sampled_at = time.perf_counter()
        self._score(groups)
        self.seconds["rollout"] += sampled_at - start
        self.seconds["reward"] += time.perf_counter() - sampled_at
        return groups

    def _score(self, groups: list[Group]) -> None:
        """Call every reward function once on all answers, with each column of the rows repeated G times, as TRL does."""
        G = self.args.num_generations
        rows = [group.row for group in groups for _ in range(G)]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("images", "index")}
        prompts = [self.prompt_of(row) for row in rows]
        texts = [text for group in groups for text in group.texts]
        scores = []
        for function in self.reward_funcs:
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

    def set_advantages(self, groups: list[Group], gather: Callable[[torch.Tensor], torch.Tensor], rank: int) -> torch.Tensor:
        """Advantages of every group. `gather` collects (N,) tensors of all processes, which `scale_rewards="batch"` needs."""
        rewards = self.total(groups)
        if self.args.scale_rewards == "batch":
            everyone = gather(rewards.to(self.policy.device)).cpu()
            advantages = group_advantages(everyone, self.args.num_generations, scale_rewards="batch")
            advantages = advantages[rank * len(rewards) : (rank + 1) * len(rewards)]
        else:
            advantages = group_advantages(rewards, self.args.num_generations, scale_rewards=self.args.scale_rewards)
        for group, own in zip(groups, advantages.split(self.args.num_generations), strict=True):
            group.advantages = own
        return rewards


def row_seed(seed: int, step: int, round: int, index: int) -> int:
    """The seed of one row's answers at one step: different for each, and independent of batches and processes."""
    return zlib.crc32(f"{seed} {step} {round} {index}".encode())
