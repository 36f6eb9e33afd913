"""Uni-MedVLM's small networks, untaught, and a few settings that make its recipes short."""

from pathlib import Path

from engine.data.mecovqa.captions import load_captions
from engine.data.starter.unimed import build_starter_unimed
from models.starter.uni_medvlm import build_tiny_unimed

FAST = "--use_cpu true --eval_limit 6 --logging_steps 1 --max_completion_length 6 --max_steps 2 --save_steps 2".split()
FAST += ["--per_device_train_batch_size", "4"]


def save_small(folder: Path) -> Path:
    """A checkpoint folder of networks that know nothing."""
    captions = load_captions(build_starter_unimed())
    build_tiny_unimed(record["answer"] for record in captions.records).model.save_pretrained(folder)
    return folder
