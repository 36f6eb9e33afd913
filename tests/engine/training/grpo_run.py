"""A small GRPO run as a process of its own: `python -m tests.engine.training.grpo_run '{"output_dir": ..., ...}'`.

Its rewards and questions are made up; its model is the random checkpoint named by `model`. Prints the final weights' checksum.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.processes import close
from engine.tasks.evaluation import Evaluation
from engine.tasks.rewards import text_of
from engine.tasks.task import Reward
from engine.training.checkpoints import StopOnSignal, find_checkpoint
from engine.training.config.grpo import GRPOConfig
from engine.training.grpo import GRPOTrainer
from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import noise_image


def questions(num: int = 12) -> list[dict]:
    words = ["organ", "imaging technique", "answer", "X-Ray or CT"]
    return [
        {"images": [noise_image(i)], "image_id": str(i), "problem": f"What {words[i % 4]} is {i}?", "solution": "a"}
        for i in range(num)
    ]


def variety(prompts, completions, **columns):
    return [len(set(text_of(answer))) / 20 for answer in completions]


def letters(prompts, completions, **columns):
    return [float(text_of(answer).count("a")) for answer in completions]


def sometimes(prompts, completions, problem, log_metric, **columns):
    """Length, of the answers to half of the questions."""
    log_metric("logged/both", 1.0)
    return [float(len(text_of(answer))) if "CT" in asked else None for answer, asked in zip(completions, problem, strict=True)]


@dataclass
class TextTask:
    """Questions in memory, whose answer to learn is their `text`; an answer that is just that is right."""

    rewards: Sequence[Reward] = ()
    reward_weights: Sequence[float] | None = None
    legend: str = ""

    def prompt(self, row):
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["problem"]}]}]

    def target(self, row):
        return row["text"]

    def score(self, row, answer):
        return {"text": answer.text, "correct": answer.text == row.get("text")}

    def evaluation(self, results):
        accuracy = sum(result["correct"] for result in results) / len(results)
        return Evaluation(results, {"accuracy": accuracy}, {"accuracy": accuracy})

    def files(self, evaluation):
        return {}

    def shown(self, row):
        return row["problem"], row["solution"]

    def samples(self, evaluation, rows, answers):
        return []


def make_trainer(
    model: str, output_dir, *, reward_funcs=(variety, letters), rows=None, callbacks=(), policy=None, sampler=None, **settings
) -> GRPOTrainer:
    """Two prompts a micro-batch, two micro-batches a step, four answers of 10 tokens, learning fast."""
    defaults = {
        "learning_rate": 1e-3,
        "max_steps": 4,
        "max_completion_length": 10,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = GRPOConfig(output_dir=str(output_dir), **(defaults | settings))
    task = TextTask(list(reward_funcs))
    policy = policy or load_qwen_vl(model)
    return GRPOTrainer(policy, task, args, rows or questions(), sampler=sampler, callbacks=list(callbacks))


def checksum(module) -> float:
    """A number that changes when any weight does."""
    return sum(float((p.detach().double() * torch.arange(1, p.numel() + 1).view(p.shape).cos()).sum()) for p in module.parameters())


def run(settings: dict) -> None:
    """Train, and print how it ended; the trainer is gone when this returns."""
    resume = settings.pop("resume", None)
    stop = StopOnSignal()
    rewards = (variety, letters, sometimes) if settings.pop("sometimes", False) else (variety, letters)
    trainer = make_trainer(**settings, reward_funcs=rewards, callbacks=[stop])
    checkpoint = find_checkpoint(trainer.args.output_dir, resume)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        end = {"checksum": checksum(trainer.model), "step": trainer.state.global_step, "stopped": stop.received}
        print(json.dumps(end | {"logs": trainer.state.log_history}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(sys.argv[1]))
    close()  # as a command ends: a process group that outlives its trainer now and then aborts the process
