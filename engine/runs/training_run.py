"""The middle of every training run: resume or start, train to the end or to a signal, and say which checkpoint is the last."""

import json
import logging
from pathlib import Path

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from engine.command.run import RunFolder
from engine.errors import Interrupted
from engine.training.checkpoints import StopOnSignal, newest_checkpoint
from engine.training.progress import RunLog

logger = logging.getLogger(__name__)


def train_to_end(trainer: Trainer, run: RunFolder, resume: Path | None) -> Path | None:
    """Train, from the checkpoint `resume` where there is one; returns the newest whole checkpoint, if any was saved.

    Raises Interrupted after saving, where a signal asked to stop.
    """
    stop = StopOnSignal()
    for callback in (PrinterCallback, ProgressCallback):  # they write to standard output; RunLog takes their place
        trainer.remove_callback(callback)
    for callback in (stop, RunLog(run)):
        trainer.add_callback(callback)
    if resume is not None:
        step = json.loads((resume / "trainer_state.json").read_text())["global_step"]
        logger.info("resuming after step %d from %s", step, resume)
        run.truncate_metrics(step + 1)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    checkpoint = newest_checkpoint(trainer.args.output_dir)
    if stop.received:
        raise Interrupted(f"stopped by a signal after step {trainer.state.global_step}; resume from {checkpoint}")
    return checkpoint
