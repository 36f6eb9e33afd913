"""A small GRPO run as a process of its own: `python -m tests.engine.training.grpo_run '{"output_dir": ..., ...}'`.

Its rewards and questions are made up; its model is the random checkpoint named by `model`. Prints the final weights' checksum.
"""

import json
import sys

import torch

from engine.training.checkpoints import StopOnSignal, find_checkpoint
from engine.training.grpo import GRPOTrainer
from engine.training.grpo_config import GRPOConfig
from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import noise_image


def questions(num: int = 12) -> list[dict]:
    words = ["organ", "imaging technique", "answer", "X-Ray or CT"]
    return [
        {"images": [noise_image(i)], "image_id": str(i), "problem": f"What {words[i % 4]} is {i}?", "solution": "a"}
        for i in range(num)
    ]


def variety(prompts, completions, **columns):
    return [len(set(text)) / 20 for text in completions]


def letters(prompts, completions, **columns):
    return [float(text.count("a")) for text in completions]


def prompt_of(row):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["problem"]}]}]


def make_trainer(
    model: str, output_dir, *, reward_funcs=(variety, letters), rows=None, callbacks=(), policy=None, **settings
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
    return GRPOTrainer(
        policy or load_qwen_vl(model), list(reward_funcs), prompt_of, args, rows or questions(), callbacks=list(callbacks)
    )


def checksum(module) -> float:
    """A number that changes when any weight does."""
    return sum(float((p.detach().double() * torch.arange(1, p.numel() + 1).view(p.shape).cos()).sum()) for p in module.parameters())


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    resume = settings.pop("resume", None)
    stop = StopOnSignal()
    trainer = make_trainer(**settings, callbacks=[stop])
    checkpoint = find_checkpoint(trainer.args.output_dir, resume)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        print(json.dumps({"checksum": checksum(trainer.model), "step": trainer.state.global_step, "stopped": stop.received}))
