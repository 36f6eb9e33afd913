"""The metrics of a GRPO step under TRL's names, kept as tensors until they are logged, and a few answers for the report.

Letters: G answers a prompt, N answers in all, F reward functions.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from engine.files import plain
from engine.report.content import Sample, ShownAnswer
from engine.rollout.answers import Answer
from engine.tasks.task import Task
from engine.training.config.grpo import GRPOConfig
from engine.training.groups import Group

MAX_SAMPLES = 16  # groups kept for the report, spread evenly over the run


class StepLog:
    """Collects what happens between two logs; `collect` averages it over steps and processes."""

    def __init__(self, args: GRPOConfig, task: Task, reward_names: list[str]):
        self.args, self.task, self.names = args, task, reward_names
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.seconds = {"train": 0.0}
        self.tokens = 0.0
        self.started: float | None = None
        self.samples: list[Sample] = []
        self.sample_every = 1
        self.last_groups: list[Group] = []

    def start_step(self) -> None:
        self.started = self.started or time.perf_counter()

    def add(self, name: str, value: torch.Tensor | float) -> None:
        self.values[name].append(torch.as_tensor(value, dtype=torch.float32).detach())

    def add_tensors(self, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self.add(name, value)

    def add_groups(self, groups: list[Group], totals: torch.Tensor, step: int) -> None:
        """Rewards and lengths of a step's answers; `totals` (N,) are their weighted rewards."""
        by_group = totals.view(len(groups), -1)
        rewards = torch.cat([group.rewards for group in groups])
        lengths = torch.cat([group.completion_mask.sum(1) for group in groups]).float()
        truncated = torch.cat([group.truncated for group in groups])
        self.add("reward", totals.nanmean())
        self.add("reward_std", by_group.std(1).nanmean())
        self.add("frac_reward_zero_std", (by_group == by_group[:, :1]).all(1).float().mean())
        self.add("frac_advantage_zero", torch.cat([group.advantages == 0 for group in groups]).float().mean())
        for name, column in zip(self.names, rewards.T, strict=True):
            column = column[~column.isnan()]
            if len(column):
                self.add(f"rewards/{name}/mean", column.mean())
                self.add(f"rewards/{name}/std", column.std() if len(column) > 1 else 0.0)
        self.add("completions/mean_length", lengths.mean())
        self.add("completions/min_length", lengths.min())
        self.add("completions/max_length", lengths.max())
        self.add("completions/clipped_ratio", truncated.float().mean())
        self.tokens += lengths.sum().item()
        self.last_groups = groups
        if step % self.sample_every == 0:
            self.samples.append(self._sample(groups[0], step))
            if len(self.samples) > MAX_SAMPLES:
                self.samples, self.sample_every = self.samples[::2], 2 * self.sample_every

    def collect(self, accelerator: Any, sampling_seconds: dict[str, float], step: int) -> dict[str, float]:
        """Means since the last call; seconds and tokens per second are those of this process."""
        elapsed = time.perf_counter() - (self.started or 0.0)
        logs = {}
        for name in sorted(self.values):
            mean = torch.stack([value.to(accelerator.device) for value in self.values[name]]).mean()
            logs[name] = accelerator.reduce(mean, "mean").item()
        logs["tokens_per_second"] = self.tokens / elapsed
        for name, seconds in [*sampling_seconds.items(), *self.seconds.items()]:
            logs[f"seconds/{name}"] = seconds
        logs["seconds/step"] = elapsed
        for name in sampling_seconds:
            sampling_seconds[name] = 0.0
        self.seconds["train"], self.tokens, self.started = 0.0, 0.0, None
        self.values.clear()
        if self.args.log_completions and self.last_groups and accelerator.is_main_process:
            self._show_answers(step)
        return logs

    def _sample(self, group: Group, step: int) -> Sample:
        question, solution = self.task.shown(group.row)
        image = group.row["images"][0] if group.row["images"] else None
        answers = [
            ShownAnswer(text, dict(zip(self.names, rewards, strict=True)), self._right(group, text), advantage)
            for text, rewards, advantage in zip(group.texts, group.rewards.tolist(), group.advantages.tolist(), strict=True)
        ]
        return Sample(image, question, solution, answers, step)

    def _right(self, group: Group, text: str) -> bool | None:
        return self.task.score(group.row, Answer(text)).get("correct")

    def _show_answers(self, step: int) -> None:
        samples = [self._sample(group, step) for group in self.last_groups]
        with open(Path(self.args.output_dir) / "completions.jsonl", "a", encoding="utf-8") as file:
            for sample in samples:
                answers = [
                    {"text": answer.text, "rewards": answer.scores, "advantage": answer.advantage} for answer in sample.answers
                ]
                line = {"step": step, "question": sample.question, "solution": sample.solution, "completions": answers}
                file.write(json.dumps(plain(line), ensure_ascii=False) + "\n")
        lines = [f"question: {samples[0].question}"]
        for answer in samples[0].answers:
            scores = ", ".join(f"{name} {value:g}" for name, value in answer.scores.items())
            lines.append(f"  [{scores}] {answer.text}")
        tqdm.write("\n".join(lines))
