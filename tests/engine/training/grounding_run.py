"""A small grounding run as a process of its own: `python -m tests.engine.training.grounding_run '{"output_dir": ..., ...}'`.

Of its rows some have no mask, one has two. `policy` is "llava" (`tests.drawing_policy`) or "unimed". Prints the weights' checksum.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.processes import close
from engine.rollout.policy import GroundingPolicy
from engine.training.config.grounding import GroundingConfig
from engine.training.grounding import GroundingTrainer
from models.starter.uni_medvlm import build_tiny_unimed
from tests.drawing_policy import build_drawing_policy
from tests.engine.training.grpo_run import TextTask, checksum, questions
from tests.tiny_qwen import noise_image

ANSWERS = ["<SEG>", "CT", "It is here: <SEG> and there <SEG>.", "no lesion at all"]
SIZES = [(84, 56), (40, 56), (60, 60), (84, 56)]  # (width, height)


def rows(num: int = 12) -> list[dict]:
    """Questions about images of different sizes; every other answer has masks, of noise: PIL images, or arrays of 0 and 1."""
    found = []
    for i, row in enumerate(questions(num)):
        width, height = SIZES[i % 4]
        text = ANSWERS[i % len(ANSWERS)]
        noise = np.random.default_rng(i).random((text.count("<SEG>"), height, width)) > 0.7
        masks: list[Any] = (
            [Image.fromarray(mask.astype(np.uint8) * 255) for mask in noise] if i % 8 else list(noise.astype("uint8"))
        )
        image = noise_image(i, width, height)
        found.append(row | {"images": [image], "text": text, "masks": masks, "source": "made.json", "row": i})
    return found


@dataclass
class DrawTask(TextTask):
    """Also of rows without an image."""

    def prompt(self, row):
        return [
            {"role": "user", "content": [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": row["problem"]}]}
        ]


def build(kind: str = "llava", balance: float | None = None) -> GroundingPolicy:
    """A policy of random weights whose masks are trained too."""
    corpus = [*(row["problem"] for row in questions()), *ANSWERS]
    if kind == "llava":
        return build_drawing_policy(corpus, balance=balance)
    policy = build_tiny_unimed(corpus, hidden_size=64, num_layers=2)
    policy.model.visual_model.mask_decoder.requires_grad_(True)
    return policy


def make_trainer(output_dir, *, policy: Any = "llava", balance=None, data=None, **settings) -> GroundingTrainer:
    """Two rows a micro-batch, two micro-batches a step, learning fast."""
    defaults = {
        "learning_rate": 1e-3,
        "max_steps": 3,
        "max_completion_length": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = GroundingConfig(output_dir=str(output_dir), **(defaults | settings))
    policy = build(policy, balance) if isinstance(policy, str) else policy
    return GroundingTrainer(policy, DrawTask(), args, data or rows())


def run(settings: dict) -> None:
    """Train, and print how it ended; the trainer is gone when this returns."""
    trainer = make_trainer(**settings)
    trainer.train()
    if trainer.is_world_process_zero():
        print(json.dumps({"checksum": checksum(trainer.model), "logs": trainer.state.log_history[:-1]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(sys.argv[1]))
    close()  # as in grpo_run
