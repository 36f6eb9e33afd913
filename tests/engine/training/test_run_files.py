"""What a killed run had written is written once: metrics.jsonl and completions.jsonl of one begun anew, and of one resumed."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.tiny_qwen import save_tiny

# Each run is a fork of the script, which has imported what takes long. It is killed while it scores the answers of step 4.
SCRIPT = """
import os, shutil, signal, sys, threading
import torch
from tqdm import tqdm
from engine.command.run_folder import open_run
from engine.runs.train import train_to_end
from engine.training.checkpoints import find_checkpoint
from tests.engine.training.grpo_run import make_trainer, questions, variety

tqdm.set_lock(threading.RLock())
rows = [row | {"problem": row["problem"] + chr(0x2028) + "?"} for row in questions()]

def go_on(folder, save_steps, killed):
    torch.set_num_threads(1)
    calls = []
    def reward(prompts, completions, **columns):
        calls.append(1)
        if killed and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return variety(prompts, completions, **columns)
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": save_steps, "log_completions": True}
    resume = find_checkpoint(folder, None if save_steps > 5 else "true")
    run = open_run("logged", folder)
    train_to_end(make_trainer(sys.argv[1], folder, reward_funcs=[reward], rows=rows, **settings), run, resume)

for folder, save_steps, killed in (("whole", 9, 0), ("anew", 9, 1), ("anew", 9, 0), ("resumed", 2, 1), ("resumed", 2, 0)):
    child = os.fork()
    if not child:
        try:
            go_on(folder, save_steps, killed)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGKILL if killed else 0), (folder, code)
    if killed:
        shutil.copy(f"{folder}/metrics.jsonl", f"{folder}/killed.jsonl")
"""


def steps(folder, name):
    return [json.loads(line)["step"] for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
def test_each_step_is_logged_once_by_a_run_killed_before_or_after_its_first_save(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "script.py", save_tiny(tmp_path / "model")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("anew", "resumed"):
        assert steps(tmp_path / name, "killed.jsonl") == [1, 2, 3]  # what was there when it was killed
    for name in ("whole", "anew", "resumed"):
        assert steps(tmp_path / name, "metrics.jsonl") == [1, 2, 3, 4, 5]
        assert steps(tmp_path / name, "completions.jsonl") == [step for step in range(1, 6) for _ in range(4)]
    whole, anew, resumed = ((tmp_path / name / "completions.jsonl").read_bytes() for name in ("whole", "anew", "resumed"))
    assert whole == anew == resumed
