"""The bench of a GRPO step still speaks the trainer's language: one measured step of ours, in a process of its own."""

import json
import subprocess
import sys

from bench.grpo_step import save_model
from tests.conftest import ROOT


def test_our_provider_measures_a_step(tmp_path):
    save_model(str(tmp_path))
    command = [sys.executable, "-m", "bench.grpo_step", "--provider", "vesalius", "--steps", "1", "--model", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.strip().splitlines()[-1])
    assert 0 < row["rollout_s"] < row["step_s"] and row["train_s"] > 0
