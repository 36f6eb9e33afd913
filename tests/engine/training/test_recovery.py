"""Stopping, being killed and resuming; two processes equal one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.errors import InputError
from engine.training.checkpoints import find_checkpoint, newest_checkpoint
from tests.conftest import ROOT
from tests.engine.training.grpo_run import checksum, make_trainer
from tests.tiny_qwen import save_tiny

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def start(settings: dict, *, processes: int = 1, module: str = "tests.engine.training.grpo_run") -> subprocess.Popen:
    command = [sys.executable, "-m", module, json.dumps(settings)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
        ]
        command = [sys.executable, *launcher, "-m", module, json.dumps(settings)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.005)


@pytest.mark.parametrize(
    "settings", [{}, {"num_iterations": 2, "sync_ref_model": True, "ref_model_sync_steps": 2, "dynamic_sampling": True}]
)
def test_resume_is_bit_exact(model, tmp_path, settings):
    """Killed after step 3 of 7 (in the second epoch, with answers half used) and resumed: the same weights to the last bit."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, **settings}
    whole = make_trainer(model, tmp_path / "whole", **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = make_trainer(model, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 7 and checksum(resumed.model) == checksum(whole.model)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sigkill_while_saving_resumes_from_the_last_whole_checkpoint(model, tmp_path):
    """SIGKILL arrives when the model of checkpoint-2 is written and its optimizer is not."""
    settings = {"model": model, "output_dir": str(tmp_path / "run"), "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    process = start(settings | {"kill_at": 2}, module="tests.engine.training.killed_run")
    process.wait(timeout=240)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / ".saving" / "checkpoint-2" / "model.safetensors").is_file()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-1"
    resumed = finish(start(settings | {"resume": "true"}))
    whole = finish(start(settings | {"output_dir": str(tmp_path / "whole")}))
    assert resumed["step"] == 3 and resumed["checksum"] == whole["checksum"]
    assert not (tmp_path / "run" / ".saving").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(model, tmp_path, number):
    settings = {
        "model": model,
        "output_dir": str(tmp_path),
        "max_steps": 500,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
    }
    process = start(settings)
    wait_for(tmp_path / "checkpoint-1", process)
    process.send_signal(number)
    result = finish(process)
    assert result["stopped"] == number and 1 <= result["step"] < 500
    assert newest_checkpoint(tmp_path).name == f"checkpoint-{result['step']}"
    find_checkpoint(str(tmp_path), "true")  # whole and resumable


def test_two_processes_equal_one_with_twice_the_batch(model, tmp_path):
    """The same prompts, the same answers (randomness belongs to the prompt) and so the same gradients and weights."""
    settings = {"model": model, "max_steps": 3, "gradient_accumulation_steps": 1}
    two = start(settings | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2}, processes=2)
    two = finish(two)
    one = finish(start(settings | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4}))
    assert two["step"] == one["step"] == 3
    assert two["checksum"] == pytest.approx(one["checksum"], rel=1e-5)


def test_old_checkpoints_rotate_and_the_rest_stay_whole(model, tmp_path):
    make_trainer(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("*")) == ["checkpoint-3", "checkpoint-4"]


def test_what_resume_means(model, tmp_path):
    assert find_checkpoint(str(tmp_path), None) is None and find_checkpoint(str(tmp_path), "true") is None
    with pytest.raises(InputError, match="--resume_from_checkpoint .*nowhere: no such folder"):
        find_checkpoint(str(tmp_path), str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="not a training checkpoint"):
        find_checkpoint(str(tmp_path), str(tmp_path))
    make_trainer(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    with pytest.raises(InputError, match=r"already holds checkpoint-1; pass --resume_from_checkpoint true or another --output_dir"):
        find_checkpoint(str(tmp_path), None)
    with pytest.raises(InputError, match=r"holds only the model \(--save_only_model\)"):
        find_checkpoint(str(tmp_path), "true")
