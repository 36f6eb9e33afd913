"""Runs of two processes that fail in many ways, one run after another, each process a fork of this one: its imports take seconds.

`python -m tests.engine.training.failing_run MODEL FOLDER KIND...`: FOLDER/KIND.json says how the two ended and after how many
seconds, KIND.RANK.out and .err what they said.
"""

import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch.distributed import TCPStore
from tqdm import tqdm

from engine.command.main import run_command
from engine.data.rows import Rows
from engine.data.splits import Splits
from engine.errors import InputError
from engine.processes import rank
from engine.runs.train import train
from engine.training.config.grpo import GRPOConfig
from engine.training.grpo import GRPOTrainer
from models.qwen.policy import load_qwen_vl
from tests.engine.training.grpo_run import TextTask, questions, variety

LONGEST = 150  # seconds, of a run that hangs
tqdm.set_lock(threading.RLock())  # its own is one for all processes of a fork, and would stay locked after a killed one
SETTINGS = {"max_steps": 4, "save_steps": 2, "max_completion_length": 6, "num_generations": 2, "learning_rate": 1e-3}


class Questions(Rows):
    """Rows in memory; `bad_from`: opening a row of training fails from this call on."""

    bad_from, opened = 1000, 0

    def open(self, handle):
        Questions.opened += len(self) > 4
        if Questions.opened >= Questions.bad_from:
            raise InputError(f"train.json: row {handle}: image changed (expected a picture; rows count from 0)")
        return {}


class FailingTrainer(GRPOTrainer):
    """Fails in the second of two processes (in the first: kinds that say so)."""

    kind = ""

    def at(self, kind: str, place: int = 1) -> bool:
        return self.kind == kind and rank() == place

    def answer(self, rows):
        if self.at("SIGTERM_in_evaluation"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.at("evaluation"):
            raise InputError("test.json: row 2: image changed (expected a picture; rows count from 0)")
        if self.kind == "waiting_for_ever":
            if rank() == 1:
                raise InputError("the second process failed")
            time.sleep(2 * LONGEST)
        return super().answer(rows)

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        return loss * torch.nan if self.at("not_finite") and self.state.global_step == 2 else loss

    def save_extra(self, folder):
        for kind, place in (("save_of_first", 0), ("save_of_second", 1)):
            if self.at(kind, place):
                raise OSError(errno.ENOSPC, "No space left on device", str(folder / "extra.pt"))
        super().save_extra(folder)


def reward_of(kind: str):
    """A reward that fails in the second process, at its second call."""
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        if rank() == 0 and len(calls) == 2 and kind == "raises_in_first":
            raise KeyError("organ")
        if rank() == 1 and kind == "none_of_one_rank":
            return [None] * len(completions)
        if rank() == 1 and len(calls) == 2:
            if kind == "raises":
                raise ValueError("no such organ")
            if kind == "wrong_number":
                return [1.0]
            if kind == "not_a_number":
                return ["much"] * len(completions)
            if kind == "exits":
                sys.exit(0)
            if kind in ("SIGTERM", "SIGINT", "SIGKILL"):
                os.kill(os.getpid(), getattr(signal, kind))
        return variety(prompts, completions, **columns)

    return reward


def main(argv: list[str]) -> dict:
    model, folder, kind = argv
    if kind == "before_joining" and rank() == 1:  # while the other waits for this one to join it, in GRPOConfig
        time.sleep(1)
        raise InputError("settings.yaml: No such file or directory")
    args = GRPOConfig(output_dir=str(Path(folder) / kind), report_to="none", disable_tqdm=True, **SETTINGS)
    rows = Questions([*questions(12)], list(range(12)))
    if kind == "bad_row" and rank() == 1:
        Questions.bad_from = 7  # of step 4; two a step, read a step ahead
    FailingTrainer.kind = kind
    if kind == "bug" and rank() == 1:
        FailingTrainer.step_metrics = lambda self: {}["a name that is missing"]
    if kind == "setting":  # before anything is begun, the same in both
        raise InputError("--learning_rate nan: expected a number, more than 0")
    splits = Splits(rows, Questions([*questions(4)], list(range(4))))
    task = TextTask([reward_of(kind)])
    return train("failing", "A run", FailingTrainer, lambda: load_qwen_vl(model), task, splits, args, {"training": args})


def start(place: int, store: TCPStore, model: str, folder: Path, kind: str) -> int:
    """The process id of one of two, which trains as a command that `torchrun` started: `store` is where it holds its own."""
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(place), "LOCAL_RANK": str(place), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "0"}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        for descriptor, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{kind}.{place}.{ending}", os.O_WRONLY | os.O_CREAT), descriptor)
        try:
            run_command(main, [model, str(folder), kind])
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait(children: list[int]) -> list[dict]:
    """How each ended: exit code (minus the signal's number), seconds. What hangs is killed."""
    begun, ends = time.perf_counter(), {}
    while len(ends) < len(children):
        time.sleep(0.05)
        for child in set(children) - set(ends):
            if time.perf_counter() - begun > LONGEST:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                ends[child] = {"code": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - begun}
    return [ends[child] for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder, *kinds = sys.argv[1:]
    for kind in kinds:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ends = wait([start(place, store, model, Path(folder), kind) for place in range(2)])
        (Path(folder) / f"{kind}.json").write_text(json.dumps(ends))
