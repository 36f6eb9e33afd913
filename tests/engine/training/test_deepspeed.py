"""DeepSpeed: its optimizer under every schedule, a resumed run, whose weights DeepSpeed reads and not the Trainer, and ZeRO-2 and
ZeRO-3 on two processes, which train as one process does."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

from engine.errors import InputError
from models.loading import load_policy
from tests.conftest import ROOT
from tests.engine.training import grounding_run, grpo_run, sft_run
from tests.engine.training.grpo_run import checksum
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

# Of two processes. Rows of some kinds have no image or no mask, so that they differ in what they run.
TWO = """
import json
import sys
import deepspeed.ops
import torch
from engine.processes import close
from tests.engine.training import grounding_run, sft_run
from tests.engine.training.grpo_run import checksum
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
kind, settings = json.loads(sys.argv[1])
make = {"sft": sft_run, "grounding": grounding_run}[kind].make_trainer
trainer = make(**settings)
trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
if trainer.is_world_process_zero():  # alone: it has all weights again
    said = trainer.answer(trainer.train_dataset.rows[:2])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"losses": losses, "checksum": checksum(trainer.model), "said": [answer.text for answer in said]}))
close()
"""
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (vesalius[scale])")


def on_two(folder, kind, **settings):
    """What two processes that train so print."""
    (folder / "two.py").write_text(TWO)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    place = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "PYTHONPATH": os.pathsep.join(paths)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "two.py"]
    command = [*launch, json.dumps([kind, {"logging_steps": 1, **settings}])]
    done = subprocess.run(command, cwd=folder, env=os.environ | place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def settings_file(name):
    """One of the recipes', with tiny weights divided too, and PyTorch's optimizer: DeepSpeed's takes minutes to build."""
    config = json.loads((ROOT / "recipes" / "deepspeed" / f"{name}.json").read_text()) | {"zero_force_ds_cpu_optimizer": False}
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


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


@DEEPSPEED
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


@DEEPSPEED
def test_zero3_tunes_as_one_process_does_and_its_checkpoint_goes_on_and_loads_without_it(tmp_path):
    model = save_tiny(tmp_path / "model")
    alone = sft_run.make_trainer(model, tmp_path / "alone", max_steps=3, logging_steps=1, gradient_accumulation_steps=4)
    alone.train()
    run = {"model": model, "output_dir": "zero3", "deepspeed": settings_file("zero3"), "save_strategy": "steps", "save_steps": 2}
    whole = on_two(tmp_path, "sft", max_steps=3, **run)
    assert whole["losses"] == pytest.approx([e["loss"] for e in alone.state.log_history if "loss" in e], rel=1e-4)
    assert whole["checksum"] == pytest.approx(checksum(alone.model), abs=1e-3)
    assert whole["said"] == [answer.text for answer in alone.answer(sft_run.rows()[:2])]
    resumed = on_two(tmp_path, "sft", max_steps=3, resume_from_checkpoint="zero3/checkpoint-2", **run)
    assert resumed["checksum"] == whole["checksum"]
    saved = load_policy(tmp_path / "zero3" / "checkpoint-3")
    assert checksum(saved.model) == pytest.approx(whole["checksum"], abs=1e-6)


@DEEPSPEED
@pytest.mark.parametrize("name", ["zero2_offload", "zero3"])
def test_grounding_is_that_of_one_process_also_where_processes_differ_in_what_they_run(tmp_path, name):
    alone = grounding_run.make_trainer(tmp_path / "alone", policy="unimed", logging_steps=1, gradient_accumulation_steps=4)
    alone.train()
    config = settings_file(name)
    found = on_two(tmp_path, "grounding", output_dir="two", policy="unimed", deepspeed=config)
    assert found["losses"] == pytest.approx([e["loss"] for e in alone.state.log_history if "loss" in e], rel=1e-4)
    assert found["said"] == [answer.text for answer in alone.answer(grounding_run.rows()[:2])]


@DEEPSPEED
def test_grpo_refuses_zero3_in_one_line(tmp_path):
    with pytest.raises(InputError, match="^--deepspeed: ZeRO-3 is not supported here: .* use ZeRO-2$"):
        grpo_run.make_trainer(save_tiny(tmp_path / "model"), tmp_path / "out", deepspeed=settings_file("zero3"))
