"""A small fine-tuning run as a process of its own: `python -m tests.engine.training.sft_run '{"output_dir": ..., ...}'`.

Its questions and answers are made up; its model is the random checkpoint named by `model`. Prints the final weights' checksum.
"""

import json
import sys

import torch

from engine.processes import close
from engine.training.config.sft import SFTConfig
from engine.training.sft import SFTTrainer
from models.loading import load_policy
from tests.engine.training.grpo_run import TextTask, checksum, questions

ANSWERS = ["CT", "an MRI of a head", "<answer> C </answer>", "the answer is X-Ray"]


def rows(num: int = 12) -> list[dict]:
    """Questions whose answers differ in length."""
    return [row | {"text": ANSWERS[i % len(ANSWERS)]} for i, row in enumerate(questions(num))]


def make_trainer(model: str, output_dir, *, policy=None, data=None, **settings) -> SFTTrainer:
    """Two rows a micro-batch, two micro-batches a step, learning fast."""
    defaults = {
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = SFTConfig(output_dir=str(output_dir), **(defaults | settings))
    return SFTTrainer(policy or load_policy(model), TextTask(), args, data or rows())


def run(settings: dict) -> None:
    """Train, and print how it ended; the trainer is gone when this returns."""
    trainer = make_trainer(**settings)
    trainer.train()
    if trainer.is_world_process_zero():
        print(json.dumps({"checksum": checksum(trainer.model), "losses": [r["loss"] for r in trainer.state.log_history[:-1]]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(sys.argv[1]))
    close()  # as in grpo_run
