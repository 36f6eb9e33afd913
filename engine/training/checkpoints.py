"""Finding the checkpoint to resume from, and stopping on a signal after saving one."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from engine.errors import InputError
from engine.training.manifest import check_whole, checkpoints

logger = logging.getLogger(__name__)


def find_checkpoint(output_dir: str, flag: str | None) -> Path | None:
    """What `--resume_from_checkpoint` means: None, a path, or `true` for the newest checkpoint of `output_dir`.

    Raises InputError where it cannot be resumed from, and where checkpoints are there but resuming was not asked for. One that is
    damaged is not passed over in silence: the error offers the one before it.
    """
    newest = newest_checkpoint(output_dir)
    if flag in (None, "", "false", "False"):
        if newest is not None:
            raise InputError(
                f"{output_dir}: already holds {newest.name}; pass --resume_from_checkpoint true or another --output_dir"
            )
        return None
    if flag in ("true", "True"):
        if newest is None:
            logger.warning("--resume_from_checkpoint true: no checkpoint in %s; starting afresh", output_dir)
        else:
            check_whole(newest)
        return newest
    path = Path(flag)
    if not path.is_dir():
        raise InputError(f"--resume_from_checkpoint {flag}: no such folder")
    check_whole(path)
    return path


def newest_checkpoint(output_dir: str) -> Path | None:
    """The checkpoint with the highest step, or None."""
    found = checkpoints(Path(output_dir))
    return found[-1] if found else None


class StopOnSignal(TrainerCallback):
    """SIGINT or SIGTERM: finish the step, save, stop. A second signal ends the process at once.

    `received` is the signal's number once one process has got one; all processes then stop after the same step.
    """

    received: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            flag = torch.tensor([self.received or 0], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.received = int(flag) or None
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
