"""Twenty kills; `python -m tests.engine.training.kill_resume` makes two hundred."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT


def test_a_run_killed_at_any_moment_ends_with_the_weights_of_one_never_killed(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.engine.training.kill_resume", "20"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kills"] == 20 and counted["while saving"] >= 5 and counted["runs"] >= 2
