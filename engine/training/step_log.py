"""The metrics of a GRPO step under TRL's names, kept as tensors until they are logged, and a few answers for the report.

Letters: G answers a prompt, N answers in all, F reward functions.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from engine.data.loaders.undecoded import as_picture
from engine.files import json_line
from engine.report.content import Sample, ShownAnswer
from engine.rollout.answers import Answer
from engine.tasks.task import Task
from engine.training.config.grpo import GRPOConfig
from engine.training.groups import Group

LEAST, MOST = ("min_length", "low_min"), ("max_length", "high_max")  # ends of names that are not means
MAX_SAMPLES = 16  # groups kept for the report, spread evenly over the run


class Spread(NamedTuple):
    """Of the numbers of each column: how many they are, their sum, and the sum of squares of what parts them from their mean.

    Tensors (..., F) in float64; `join` makes one of several processes' (P, ..., F).
    """

    number: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> "Spread":
        """(N, F), where NaN is no number."""
        values = values.double()
        return cls((~values.isnan()).sum(0).double(), values.nansum(0), (values - values.nanmean(0)).square().nansum(0))

    def join(self) -> "Spread":
        number, total = self.number.sum(0), self.total.sum(0)
        apart = (self.number * (self.mean - total / number).square()).nansum(0)
        return Spread(number, total, self.squares.sum(0) + apart)

    @property
    def mean(self) -> torch.Tensor:
        """NaN of none."""
        return self.total / self.number

    @property
    def std(self) -> torch.Tensor:
        """Unbiased; NaN of fewer than two."""
        return torch.where(self.number > 1, self.squares / (self.number - 1), torch.nan).sqrt()


class StepLog:
    """Collects what happens between two logs; `collect` makes one number of it over steps and processes.

    Names and their order are fixed when it is made, so that every process has the same ones, whatever it has seen.
    """

    def __init__(self, args: GRPOConfig, task: Task, reward_names: list[str]):
        self.args, self.task, self.names = args, task, reward_names
        self.step_names = ["frac_reward_zero_std", "frac_advantage_zero", "completions/mean_length"]
        self.step_names += ["completions/clipped_ratio", "completions/min_length", "completions/max_length"]
        self.loss_names = ["entropy", *(["kl"] if args.loss.beta else [])]
        clips = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
        self.loss_names += ["cispo_clip_ratio"] if args.loss.is_cispo else [f"clip_ratio/{name}" for name in clips]
        self.of_steps: list[torch.Tensor] = []  # a number for each of `step_names`
        self.of_losses: list[torch.Tensor] = []  # a number for each of `loss_names`, on the device
        # (3, F + 2) a step, its Spreads: of weighted rewards, of each function's, of groups' deviations
        self.rewards: list[torch.Tensor] = []
        self.seconds = {"train": 0.0}
        self.tokens = 0.0
        self.started: float | None = None
        self.samples: list[Sample] = []
        self.sample_every = 1
        self.last_groups: list[Group] = []

    def start_step(self) -> None:
        self.started = self.started or time.perf_counter()

    def add_tensors(self, metrics: dict[str, torch.Tensor]) -> None:
        """The metrics of a loss; nothing waits for the device."""
        self.of_losses.append(torch.stack([metrics[name].detach().float() for name in self.loss_names]))

    def add_groups(self, groups: list[Group], totals: torch.Tensor, step: int) -> None:
        """Rewards and lengths of a step's answers; `totals` (N,) are their weighted rewards."""
        by_group = totals.view(len(groups), -1)
        known = ~by_group.isnan()
        equal = (by_group.nan_to_num(nan=-torch.inf).amax(1) == by_group.nan_to_num(nan=torch.inf).amin(1)) & (known.sum(1) > 1)
        rewards = torch.cat([group.rewards for group in groups])
        spreads = [Spread.of(torch.cat([totals[:, None], rewards], 1)), Spread.of(Spread.of(by_group.T).std[:, None])]
        self.rewards.append(torch.cat([torch.stack(spread) for spread in spreads], 1))
        lengths = torch.cat([group.completion_mask.sum(1) for group in groups]).double().cpu()
        truncated = torch.cat([group.truncated for group in groups]).double().cpu()
        flat = torch.cat([group.advantages == 0 for group in groups]).double().cpu()
        of_step = [equal.double().mean(), flat.mean(), lengths.mean(), truncated.mean(), lengths.min(), lengths.max()]
        self.of_steps.append(torch.stack(of_step))
        self.tokens += lengths.sum().item()
        self.last_groups = groups
        if step % self.sample_every == 0:
            self.samples.append(self._sample(groups[0], step))
            if len(self.samples) > MAX_SAMPLES:
                self.samples, self.sample_every = self.samples[::2], 2 * self.sample_every

    def collect(
        self, accelerator: Any, sampling_seconds: dict[str, float], logged: dict[str, list[float]], step: int
    ) -> dict[str, float]:
        """What happened since the last call, over all processes: means over steps, the least of the least, the most of the most.

        One exchange between processes; a second one where reward functions have `logged` metrics of their own. What no process has
        seen is left out. Seconds are those of this process.
        """
        elapsed = time.perf_counter() - (self.started or 0.0)
        numbers = [torch.tensor([self.tokens, float(len(logged))], dtype=torch.float64)]
        for names, seen in ((self.step_names, self.of_steps), (self.loss_names, self.of_losses)):
            none = torch.full((1, len(names)), torch.inf, dtype=torch.float64)
            values = torch.stack(seen).double().cpu() if seen else none[:0]
            low, high = torch.cat([values, none]).amin(0), torch.cat([values, -none]).amax(0)
            numbers += [torch.tensor([len(seen)]), values.sum(0), low, high]
        numbers += [spread.flatten() for spread in self.rewards]
        everyone = _of_all_processes(accelerator, torch.cat(numbers))
        tokens, num_logged = everyone[:, :2].sum(0).tolist()
        rest = everyone[:, 2:]
        logs: dict[str, float] = {}
        for names in (self.step_names, self.loss_names):
            F = len(names)
            count, total, least, most = rest[:, : 1 + 3 * F].split([1, F, F, F], 1)
            rest = rest[:, 1 + 3 * F :]
            if count.sum() > 0:
                means = total.sum(0) / count.sum()
                for name, mean, low, high in zip(names, means, least.amin(0), most.amax(0), strict=True):
                    logs[name] = (low if name.endswith(LEAST) else high if name.endswith(MOST) else mean).item()
        logs |= self._reward_metrics(rest)
        logs = dict(sorted(logs.items()))
        if num_logged:
            logs = _logged_means(accelerator, logged) | logs
        logs["tokens_per_second"] = tokens / elapsed
        for name, seconds in [*sampling_seconds.items(), *self.seconds.items()]:
            logs[f"seconds/{name}"] = seconds
        logs["seconds/step"] = elapsed
        for name in sampling_seconds:
            sampling_seconds[name] = 0.0
        self.seconds["train"], self.tokens, self.started = 0.0, 0.0, None
        logged.clear()
        for collected in (self.of_steps, self.of_losses, self.rewards):
            collected.clear()
        if self.args.log_completions and self.last_groups and accelerator.is_main_process:
            self._show_answers(step)
        return logs

    def _reward_metrics(self, spreads: torch.Tensor) -> dict[str, float]:
        """Each step's means and deviations, averaged over the steps that have them; `spreads` (P, M): P processes' of all steps."""
        columns = len(self.names) + 2
        by_step = spreads.view(len(spreads), spreads.shape[1] // (3 * columns), 3, columns).unbind(1)
        steps = [Spread(*step.unbind(1)).join() for step in by_step]
        means, stds = ([getattr(step, what) for step in steps] for what in ("mean", "std"))
        found = {"reward": [mean[0] for mean in means], "reward_std": [mean[-1] for mean in means]}
        for i, name in enumerate(self.names, start=1):
            found |= {f"rewards/{name}/mean": [mean[i] for mean in means], f"rewards/{name}/std": [std[i] for std in stds]}
        known = {name: [value for value in values if not value.isnan()] for name, values in found.items()}
        return {name: torch.stack(values).mean().item() for name, values in known.items() if values}

    def _sample(self, group: Group, step: int) -> Sample:
        question, solution = self.task.shown(group.row)
        image = as_picture(group.row["images"][0]) if group.row["images"] else None
        answers = []
        for text, rewards, advantage in zip(group.texts, group.rewards.tolist(), group.advantages.tolist(), strict=True):
            scores = {name: reward for name, reward in zip(self.names, rewards, strict=True) if not math.isnan(reward)}
            answers.append(ShownAnswer(text, scores, self._right(group, text), advantage))
        return Sample(image, question, solution, answers, step)

    def _right(self, group: Group, text: str) -> bool | None:
        return self.task.score(group.row, Answer(text)).get("correct")

    def _show_answers(self, step: int) -> None:
        samples = [self._sample(group, step) for group in self.last_groups]
        with open(Path(self.args.output_dir) / "completions.jsonl", "ab") as file:
            for group, sample in zip(self.last_groups, samples, strict=True):
                answers = [
                    {"text": answer.text, "rewards": answer.scores, "advantage": answer.advantage}
                    | {column: values[i] for column, values in group.extra.items()}
                    for i, answer in enumerate(sample.answers)
                ]
                line = {"step": step, "question": sample.question, "solution": sample.solution, "completions": answers}
                file.write(json_line(line))
        lines = [f"question: {samples[0].question}"]
        for answer in samples[0].answers:
            scores = ", ".join(f"{name} {value:g}" for name, value in answer.scores.items())
            lines.append(f"  [{scores}] {answer.text}")
        tqdm.write("\n".join(lines))


def _of_all_processes(accelerator: Any, numbers: torch.Tensor) -> torch.Tensor:
    """(M,) -> (processes, M)."""
    return numbers[None] if accelerator.num_processes == 1 else accelerator.gather(numbers[None].to(accelerator.device)).cpu()


def _logged_means(accelerator: Any, logged: dict[str, list[float]]) -> dict[str, float]:
    """The mean of what was logged under each name, in any process."""
    parts = gather_object([dict(logged)]) if accelerator.num_processes > 1 else [logged]
    names = sorted({name for part in parts for name in part})
    values = {name: [value for part in parts for value in part.get(name, [])] for name in names}
    return {name: sum(values[name]) / len(values[name]) for name in names}
