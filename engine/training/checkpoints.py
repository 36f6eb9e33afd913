"""Checkpoints that are whole or absent, resuming from the newest, and stopping on a signal."""

import logging
import os
import re
import shutil
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from engine.errors import InputError

STAGING = ".saving"
logger = logging.getLogger(__name__)


class WholeCheckpoints:
    """Mixed into a Trainer: `checkpoint-N` is written in a staging folder and renamed once every process is done.

    A run killed while it saves leaves its earlier checkpoints and a staging folder that the next save clears.
    """

    _staging: str | None = None

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        staging = output / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                self.save_extra(staging / name)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(output / name, ignore_errors=True)
            os.replace(staging / name, output / name)
            staging.rmdir()
            rotate_checkpoints(output_dir=str(output), save_total_limit=self.args.save_total_limit, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if isinstance(self.model, PreTrainedModel):
            # Checkpoints have the hub's key names, which the Trainer does not translate back: it would load nothing and only warn.
            saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_extra(Path(resume_from_checkpoint))

    def save_extra(self, folder: Path) -> None:
        """Files of the subclass beside the Trainer's."""

    def load_extra(self, folder: Path) -> None:
        """Read back what `save_extra` wrote."""


def find_checkpoint(output_dir: str, flag: str | None) -> Path | None:
    """What `--resume_from_checkpoint` means: None, a path, or `true` for the newest whole checkpoint of `output_dir`.

    Raises InputError for a path that cannot be resumed from, and where checkpoints are there but resuming was not asked for.
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
            _check_resumable(newest)
        return newest
    path = Path(flag)
    if not path.is_dir():
        raise InputError(f"--resume_from_checkpoint {flag}: no such folder")
    _check_resumable(path)
    return path


def newest_checkpoint(output_dir: str) -> Path | None:
    """The whole checkpoint with the highest step, or None."""
    steps = {
        int(m[1]): path for path in Path(output_dir).glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return steps[max(steps)] if steps else None


def _check_resumable(path: Path) -> None:
    if not (path / "trainer_state.json").is_file():
        raise InputError(f"{path}: not a training checkpoint (no trainer_state.json)")
    if not any(path.glob("optimizer*")) and not any(path.glob("global_step*")):
        raise InputError(f"{path}: holds only the model (--save_only_model); training cannot resume from it")


class StopOnSignal(TrainerCallback):
    """SIGINT or SIGTERM: finish the step, save, stop. A second signal ends the process at once.

    `received` is the signal's number once one process has got one; all processes then stop after the same step.
    """

    received: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            flag = torch.tensor([self.received or 0], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.received = int(flag) or None
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
