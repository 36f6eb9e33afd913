"""DeepSpeed: its optimizer under every schedule, and a resumed run, where DeepSpeed and not the Trainer reads the weights."""

import importlib.util
import os
import socket
import subprocess
import sys

import pytest
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

from tests.conftest import ROOT
from tests.engine.training.test_masks import make_trainer
from tests.tiny_qwen import save_tiny

SCRIPT = """
import sys
import deepspeed.ops
import torch
from tests.engine.training.grpo_run import make_trainer
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, **dict.fromkeys(auto, "auto")}
settings = {"deepspeed": config, "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "beta": 0.5, "num_iterations": 2}
settings |= {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 1.0}
settings |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
whole = make_trainer(sys.argv[1], "whole", **settings)
whole.train()
resumed = make_trainer(sys.argv[1], "resumed", **settings)
resumed.train(resume_from_checkpoint="whole/checkpoint-3")
for module in ("model", "reference.model"):
    ours, theirs = (torch.nn.utils.parameters_to_vector(eval(f"trainer.{module}.parameters()")) for trainer in (whole, resumed))
    assert torch.equal(ours, theirs), module
"""


class WithoutDefaults:
    """A ZeRO optimizer as schedules see it: around torch's, whose groups it shows, and without `defaults`."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state


@pytest.mark.parametrize(
    ("schedule", "last"), [({}, 1e-6), ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5}}, 1e-5)]
)
def test_schedules_that_ask_for_the_rate_find_it_beneath_deepspeed(tmp_path, schedule, last):
    trainer = make_trainer(tmp_path, max_steps=4, **schedule)
    trainer.create_optimizer()
    trainer.optimizer = DeepSpeedOptimizerWrapper(WithoutDefaults(trainer.optimizer))
    steps = trainer.create_scheduler(4).lr_lambdas[0]
    assert steps(4) * 1e-3 == pytest.approx(last)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (vesalius[scale])")
def test_resume_is_bit_exact(tmp_path):
    """Between two passes over the same answers, and with a reference that moves: both come back as they were."""
    model = save_tiny(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    place["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "script.py", model]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
