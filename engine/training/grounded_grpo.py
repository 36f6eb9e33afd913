"""GRPO of a policy that draws: held-out answers have their masks."""

from typing import Any

from engine.data.rows import Rows
from engine.rollout.grounded import GroundedAnswers
from engine.rollout.policy import GroundingPolicy
from engine.tasks.task import Task
from engine.training.config.grpo import GRPOConfig
from engine.training.grpo import GRPOTrainer


class GroundedGRPOTrainer(GRPOTrainer):
    """Trains `policy` by the rewards of `task`, of which one may look at masks."""

    def __init__(self, policy: GroundingPolicy, task: Task, args: GRPOConfig, rows: Rows, **options: Any) -> None:
        super().__init__(policy, task, args, rows, **options)
        self.greedy = GroundedAnswers(policy, task.prompt, args.max_completion_length)
