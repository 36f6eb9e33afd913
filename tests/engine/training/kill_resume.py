"""A run killed at random moments and resumed each time, so often that many runs are killed and many come to their ends:

    python -m tests.engine.training.kill_resume [KILLS [SEED]]

Each process of the run is forked from this one, which has imported what takes long and computes nothing. Answers are sampled,
trained on twice and compared with a reference that moves; a checkpoint follows each step, and the last two are kept. A third of the
kills falls at any moment of a whole run's time, two thirds into the first, second or third save of the process, at any moment of
it, which they miss where the save is shorter than usual. A run that comes to its end must have the weights of one that was never
killed, to the bit, and each step once in metrics.jsonl; then the next one begins.
"""

import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from engine.command.run_folder import open_run
from engine.runs.train import train_to_end
from engine.training.checkpoints import find_checkpoint
from engine.training.trainer import STAGING
from tests.engine.training.grpo_run import make_trainer
from tests.tiny_qwen import save_tiny

STEPS = 6
SETTINGS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "use_cpu": True}
SETTINGS |= {"num_iterations": 2, "sync_ref_model": True, "ref_model_sync_steps": 3, "max_completion_length": 4}
LONGEST = 60  # seconds that a process may take
FURTHEST = 3  # save of a process that is killed in one: those before it are the run's progress
tqdm.set_lock(threading.RLock())  # its own is one for all processes of a fork, and would stay locked after a killed one


def go_on(model: str, folder: Path) -> None:
    """One process of a run: begin it, or go on from its newest checkpoint, to the end."""
    torch.set_num_threads(1)
    logging.disable()
    run = open_run("killed", folder)
    resume = find_checkpoint(str(folder), "true")
    trainer = make_trainer(model, folder, **SETTINGS)
    train_to_end(trainer, run, resume)
    torch.save(dict(trainer.model.named_parameters()), folder / "weights.pt")


def fork(model: str, folder: Path) -> int:
    """The process id of one that does so; what it says goes to `folder`.log."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(f"{folder}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        go_on(model, folder)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def save_of(folder: Path) -> tuple[int, int] | None:
    """What tells the save that is going on in a run folder, or was killed there, from others; None of none."""
    try:
        found = os.stat(folder / STAGING)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def ended(child: int, seconds: float, saving: Path | None = None, saves: int = 1) -> int | None:
    """Its exit code where it ends within so many seconds; None where it lives, also once it has begun so many saves in `saving`."""
    last, left, begun = time.monotonic() + seconds, saving and save_of(saving), False
    while time.monotonic() < last:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        before, begun = begun, saving is not None and save_of(saving) not in (None, left)
        saves -= begun and not before
        if saves == 0:
            return None
        time.sleep(0.0005)
    return None


def check(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    own = torch.load(folder / "weights.pt", weights_only=True)
    differ = [name for name, weight in weights.items() if not torch.equal(weight, own[name])]
    assert not differ and own.keys() == weights.keys(), f"{folder}: other weights than of a run never killed: {differ}"
    steps = [row["step"] for row in open_run("killed", folder).read_metrics()]
    assert steps == list(range(1, STEPS + 1)), f"{folder}: steps {steps}"


def kill_and_resume(kills: int, seed: int, work: Path) -> dict[str, int]:
    """Kill so often and check every end; how many kills met a save, and how many runs came to their ends."""
    chance, model = random.Random(seed), save_tiny(work / "model")
    begun, saves, saving, child, code = time.monotonic(), [], False, fork(model, work / "whole"), None
    while code is None:
        looked, before, saving = time.monotonic(), saving, save_of(work / "whole") is not None
        if saving and not before:
            saves.append(0.0)
        code = ended(child, 0.001)
        if saving:
            saves[-1] += time.monotonic() - looked
    assert code == 0, (work / "whole.log").read_text()[-2000:]
    usual, usual_save = time.monotonic() - begun, median(saves)  # on a busy machine one save may take as long as all others
    whole = torch.load(work / "whole" / "weights.pt", weights_only=True)
    check(work / "whole", whole)
    done = {"kills": 0, "while saving": 0, "runs": 0}
    while done["kills"] < kills:
        folder = work / f"run{done['runs']}"
        while True:
            before, forked, child = save_of(folder), time.monotonic(), fork(model, folder)
            if done["kills"] == kills:
                code = ended(child, LONGEST)
            elif chance.random() < 2 / 3:
                code = ended(child, LONGEST, folder, chance.randint(1, FURTHEST))
                assert time.monotonic() < forked + LONGEST, f"{folder}: neither saves nor ends"
                code = ended(child, usual_save * chance.random()) if code is None else code
            else:
                code = ended(child, usual * chance.random())
            if code is not None:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done["kills"] += 1
            done["while saving"] += save_of(folder) not in (None, before)
        assert code == 0, Path(f"{folder}.log").read_text()[-2000:]
        check(folder, whole)
        shutil.rmtree(folder)
        done["runs"] += 1
    return done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        numbers = [int(argument) for argument in sys.argv[1:]] or [200]
        print(json.dumps(kill_and_resume(numbers[0], numbers[1] if len(numbers) > 1 else 0, Path(place))))
