"""The metrics of a GRPO step under TRL's names, kept as tensors until they are logged, and a few answers for the report.

Letters: G answers a prompt, N answers in all, F reward functions.
"""

import json
import resource
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from engine.training.groups import Group
from engine.training.grpo_config import GRPOConfig

MAX_SAMPLES = 16  # groups kept for the report, spread evenly over the run


class StepLog:
    """Collects what happens between two logs; `collect` averages it over steps and processes."""

    def __init__(self, args: GRPOConfig, reward_names: list[str]):
        self.args, self.names = args, reward_names
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.seconds = {"train": 0.0}
        self.tokens = 0.0
        self.started = None
        self.samples: list[dict] = []
        self.sample_every = 1
        self.last_groups: list[Group] = []

    def start_step(self) -> None:
        self.started = self.started or time.perf_counter()

    def add(self, name: str, value) -> None:
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
            self.samples.append(groups[0].as_sample(self.names, step))
            if len(self.samples) > MAX_SAMPLES:
                self.samples, self.sample_every = self.samples[::2], 2 * self.sample_every

    def collect(self, accelerator, sampling_seconds: dict[str, float], step: int) -> dict[str, float]:
        """Means since the last call; seconds and tokens per second are those of this process."""
        elapsed = time.perf_counter() - self.started
        logs = {}
        for name in sorted(self.values):
            mean = torch.stack([value.to(accelerator.device) for value in self.values[name]]).mean()
            logs[name] = accelerator.reduce(mean, "mean").item()
        logs["tokens_per_second"] = self.tokens / elapsed
        for name, seconds in [*sampling_seconds.items(), *self.seconds.items()]:
            logs[f"seconds/{name}"] = seconds
        logs["seconds/step"] = elapsed
        logs["peak_memory_gb"] = peak_memory_gb(accelerator.device)
        for name in sampling_seconds:
            sampling_seconds[name] = 0.0
        self.seconds["train"], self.tokens, self.started = 0.0, 0.0, None
        self.values.clear()
        if self.args.log_completions and self.last_groups and accelerator.is_main_process:
            self._show_answers(step)
        return logs

    def _show_answers(self, step: int) -> None:
        with open(Path(self.args.output_dir) / "completions.jsonl", "a", encoding="utf-8") as file:
            for group in self.last_groups:
                sample = group.as_sample(self.names, step)
                file.write(json.dumps({key: value for key, value in sample.items() if key != "image"}, ensure_ascii=False) + "\n")
        group = self.last_groups[0]
        lines = [f"question: {group.row.get('problem', '')}"]
        for text, rewards in zip(group.texts, group.rewards.tolist(), strict=True):
            scores = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, rewards, strict=True))
            lines.append(f"  [{scores}] {text}")
        tqdm.write("\n".join(lines))


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in GB: of the device on CUDA, resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
