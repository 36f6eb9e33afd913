"""What GRPO, SFT and segmentation share beyond `transformers.Trainer`: whole checkpoints, one log, and answers to evaluate.

A checkpoint is whole or absent: `checkpoint-N` is written in a staging folder and renamed once every process is done. A run killed
while it saves leaves its earlier checkpoints, and a staging folder that the next save clears.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import rotate_checkpoints

from engine.device import peak_memory_gb
from engine.errors import InputError
from engine.finite import FiniteWatch, first_not_finite
from engine.processes import share_first
from engine.report.content import Sample
from engine.rollout.answers import Answer
from engine.training.checkpoints import newest_checkpoint
from engine.training.config.training import TrainingConfig

STAGING = ".saving"


class Trainer(transformers.Trainer):
    """A subclass brings its batching, its loss, `answer` and the numbers of `step_metrics`.

    `headline_metric`: the one whose first and last values are headline numbers; `evaluation_batch_size`: rows answered at once.
    """

    args: TrainingConfig
    model: Any
    train_dataset: Any
    headline_metric: str | None = None
    evaluation_batch_size = 32

    def __init__(self, model: Any, args: TrainingConfig, train_dataset: Any, **options: Any) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset, **options)
        if self.is_deepspeed_enabled and self.accelerator.deepspeed_plugin.zero_stage == 3:
            raise InputError("--deepspeed: ZeRO-3 is not supported: whole weights are needed on every device; use ZeRO-2")
        self.model_accepts_loss_kwargs = False
        self._staging: str | None = None
        self.watch = FiniteWatch()
        if broken := first_not_finite(self.model.named_parameters()):
            raise InputError(f"the model's weights are not finite: {broken}")

    def answer(self, rows: list[dict]) -> list[Answer]:
        """The model's answers to opened rows of the data set."""
        raise NotImplementedError

    def train(self, *args: Any, **options: Any) -> Any:
        """As `transformers.Trainer.train`. Then every process takes the first one's buffers, which the checkpoint has: BatchNorm's
        statistics differ, since each process has seen rows of its own."""
        result = super().train(*args, **options)
        share_first(self.model.buffers())
        return result

    def samples(self) -> list[Sample]:
        """What the report shows of training itself; nothing by default, and then it shows the evaluation's answers."""
        return []

    def step_metrics(self) -> dict[str, float]:
        """Numbers for the log since it was last asked for them."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.check_finite()
        if "loss" in logs:
            logs = logs | self.step_metrics() | {"peak_memory_gb": peak_memory_gb(self.args.device)}
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"step {self.state.global_step}: {name} is {value}; {self._advice()}")
        super().log(logs, start_time)

    # ---- what is not finite -----------------------------------------------------------------------------------------
    # Looked at where the device is waited for anyway, when a step is logged, and before a checkpoint is written.

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.note(self.state.global_step + 1, "loss", loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.watch.note(self.state.global_step + 1, "gradient's norm", grad_norm)
        return grad_norm

    def check_finite(self) -> None:
        """InputError for the first loss or gradient that is not finite."""
        self.watch.check(self._advice())

    def _advice(self) -> str:
        kept = newest_checkpoint(self.args.output_dir)
        last = f"the last good checkpoint is {kept}" if kept else "no checkpoint was saved"
        return f"{last}; a lower --learning_rate or --max_grad_norm may help"

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Hugging Face's estimate asks for tensors that our batches do not have."""
        return 0

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        self.check_finite()
        if broken := first_not_finite((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad):
            raise InputError(f"step {self.state.global_step}: the weights are not finite: {broken}; {self._advice()}")
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
        """Write a subclass's own files beside the Trainer's."""

    def load_extra(self, folder: Path) -> None:
        """Read back what `save_extra` wrote."""
