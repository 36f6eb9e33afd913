"""What GRPO, SFT and segmentation share beyond `transformers.Trainer`: whole checkpoints, one log, and answers to evaluate.

A checkpoint is whole or absent: `checkpoint-N` is written in a staging folder, its manifest last, and renamed once every process is
done. A run killed while it saves leaves its earlier checkpoints, and a staging folder that the next save clears.
"""

import math
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import rotate_checkpoints, unwrap_peft_model

from engine.data.loaders.workers import shield_workers, worker_errors
from engine.device import peak_memory_gb
from engine.errors import InputError
from engine.finite import FiniteWatch, first_not_finite
from engine.processes import share_first
from engine.report.content import Sample
from engine.rollout.answers import Answer
from engine.rollout.policy import Policy
from engine.training.checkpoints import newest_checkpoint
from engine.training.compiled.layers import CompiledLayers, HasLayers
from engine.training.config.optimization import with_rates
from engine.training.config.training import PolicyConfig, TrainingConfig
from engine.training.manifest import Manifest, check_same, check_whole, deciding_settings, loading, sizes
from engine.training.zero import divided_layers
from engine.training.zero.shared_in_order import share_in_order
from kernels.prefix_providers import unusable

STAGING = ".saving"


class Trainer(transformers.Trainer):
    """A subclass brings its batching, its loss, `answer` and the numbers of `step_metrics`.

    `headline_metric`: the one whose first and last values are headline numbers; `evaluation_batch_size`: rows answered at once;
    `may_divide`: its steps can be taken under ZeRO-3 (`engine.training.zero`).
    """

    args: TrainingConfig
    model: Any
    policy: Policy  # of those that may be divided
    deepspeed: Any
    train_dataset: Any
    headline_metric: str | None = None
    evaluation_batch_size = 32
    may_divide = False
    pictures: Any = None  # with --loader dali, what its `fill` makes of micro-batches

    def __init__(self, model: Any, args: TrainingConfig, train_dataset: Any, **options: Any) -> None:
        if args.use_liger_kernel and not isinstance(unwrap_peft_model(model), PreTrainedModel):
            kind = f"a {type(model).__name__}, which is none of transformers' models"
            raise InputError(f"--use_liger_kernel has no effect on {kind}; leave it out, or use --torch_compile")
        super().__init__(model=model, args=args, train_dataset=train_dataset, **options)
        if divided_layers.is_zero3(self) and not self.may_divide:
            raise InputError("--deepspeed: ZeRO-3 is not supported here: whole weights are needed on every device; use ZeRO-2")
        if divided_layers.is_zero3(self) and args.torch_compile:
            raise InputError("--torch_compile: ZeRO-3 is not supported: its layers are put together as they run; use ZeRO-2")
        self.model_accepts_loss_kwargs = False
        self.compiled: CompiledLayers | None = None  # while it trains
        self._staging: str | None = None
        # What the manifests of its checkpoints say; a run adds the settings that are not the trainer's, and the rows.
        self.deciding = deciding_settings([args], args.world_size)
        self.rows: dict[str, str | None] = {}
        self.watch = FiniteWatch()
        self.auxiliary_losses: list[Tensor] = []  # of micro-batches since the last log
        if broken := first_not_finite(self.model.named_parameters()):
            raise InputError(f"the model's weights are not finite: {broken}")

    def networks(self) -> list[HasLayers]:
        """Those that run in a training step; --torch_compile compiles their layers."""
        return [self.policy]

    def attend_as_asked(self, policy: Policy, args: PolicyConfig) -> None:
        """Have the policy attend by `--attention`; InputError where that cannot be had here, or the policy has it not."""
        provider, half = args.attention, args.bf16 or next(policy.model.parameters()).dtype.itemsize == 2
        if reason := unusable(provider, args.device, half=half):
            raise InputError(f"--attention {provider}: {reason}")
        try:
            policy.attend_by(provider)
        except ValueError as error:
            raise InputError(f"--attention {provider}: {error}") from None

    def answer(self, rows: list[dict]) -> list[Answer]:
        """The model's answers to opened rows of the data set."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """As `transformers.Trainer.train`. Then every process takes the first one's buffers, which the checkpoint has: BatchNorm's
        statistics differ, since each process has seen rows of its own.

        InputError where the checkpoint is damaged, or training would not go on as it was begun.
        """
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            check_same(folder, check_whole(folder), self.deciding, self.rows.get("training"))
        if self.args.torch_compile:
            backend, mode = self.args.torch_compile_backend or "inductor", self.args.torch_compile_mode
            self.compiled = CompiledLayers(self.networks(), backend, mode)
        with worker_errors():
            result = super().train(resume_from_checkpoint, *args, **options)
        if divided_layers.is_zero3(self):
            divided_layers.hold(self.deepspeed)
        share_first(self.model.buffers())
        return result

    def _get_dataloader(self, *args: Any, **options: Any) -> Any:
        loader = super()._get_dataloader(*args, **options)
        shield_workers(loader)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.pictures.fill(batches) if self.pictures else batches, count

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        args = super()._build_accelerator_args(**options)
        args.pop("dynamo_plugin", None)  # it would compile the model whole, with a break wherever the host is asked
        return args

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: transformers would take one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def samples(self) -> list[Sample]:
        """What the report shows of training itself; nothing by default, and then it shows the evaluation's answers."""
        return []

    def step_metrics(self) -> dict[str, float]:
        """Numbers for the log since it was last asked for them."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.check_finite()
        if "loss" in logs:
            compiled = self.compiled.metrics() if self.compiled else {}
            logs = (
                logs
                | self.step_metrics()
                | self._auxiliary_metrics()
                | compiled
                | {"peak_memory_gb": peak_memory_gb(self.args.device)}
            )
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"step {self.state.global_step}: {name} is {value}; {self._advice()}")
        super().log(logs, start_time)

    def auxiliary_loss(self, policy: Policy) -> Tensor | float:
        """What the micro-batch that `policy.model` has just seen adds to its loss: over a step it is the mean of its passes.

        To be called once a pass, by `head`: what `model(...)` returns is what DDP knows of.
        """
        loss = policy.auxiliary_loss()
        if loss is None:
            return 0.0
        self.auxiliary_losses.append(loss.detach())
        return loss / self.args.gradient_accumulation_steps if self.loss_is_scaled_for_ga else loss

    def _auxiliary_metrics(self) -> dict[str, float]:
        if not self.auxiliary_losses:
            return {}
        mean = self.accelerator.reduce(torch.stack(self.auxiliary_losses).mean(), "mean").item()
        self.auxiliary_losses.clear()
        return {"loss/auxiliary": mean}

    # ---- what is not finite -----------------------------------------------------------------------------------------
    # Looked at where the device is waited for anyway, when a step is logged, and before a checkpoint is written.

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with self.compiled.running() if self.compiled else nullcontext():
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
        return f"{self._last_good()}; a lower --learning_rate or --max_grad_norm may help"

    def _last_good(self) -> str:
        kept = newest_checkpoint(self.args.output_dir)
        return f"the last good checkpoint is {kept}" if kept else "no checkpoint was saved"

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
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                files, only_model = sizes(staging / name), self.args.save_only_model
                Manifest(self.state.global_step, only_model, files, self.deciding, self.rows).write(staging / name)
        except Exception as error:
            fault = _fault_of_disk(error, staging / name)
            if self.args.should_save:  # and no other: this one may still be writing there, and would say that its folder is missing
                shutil.rmtree(staging, ignore_errors=True)
            if fault is None:
                raise
            raise InputError(f"{output / name}: cannot be saved ({fault}); {self._last_good()}") from error
        finally:
            self._staging = None
        if self.args.should_save:
            shutil.rmtree(output / name, ignore_errors=True)
            os.replace(staging / name, output / name)
            staging.rmdir()
            rotate_checkpoints(output_dir=str(output), save_total_limit=self.args.save_total_limit, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with loading(Path(resume_from_checkpoint)):
            self.load_weights(Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not hasattr(self.model, "load_trained"):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir)

    def load_weights(self, folder: Path) -> None:
        """Read back the model's weights, every one of them. A model that has `load_trained` reads, and writes, what it trains."""
        if hasattr(self.model, "load_trained"):
            self.model.load_trained(folder)
            return
        if isinstance(self.model, PreTrainedModel):
            # Checkpoints have the hub's key names, which the Trainer does not translate back: it would load nothing and only warn.
            read: Any = type(self.model).from_pretrained  # which gives two things where it is asked for its loading_info
            saved, found = read(
                str(folder), dtype=self.model.dtype, trust_remote_code=False, local_files_only=True, output_loading_info=True
            )
            missing = [*found["missing_keys"], *found["mismatched_keys"]]
            self.model.load_state_dict(saved.state_dict())
        else:  # a model with adapters
            missing = self.model.load_adapter(str(folder), self.model.active_adapter, is_trainable=True).missing_keys
        if missing:
            raise ValueError(f"{missing[0]} is missing in its weights")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not divided_layers.is_zero3(self):
            super().save_model(output_dir, _internal_call)
            return
        with divided_layers.put_together(self.deepspeed):
            if self.args.should_save:
                self._save(output_dir)
            self.accelerator.wait_for_everyone()

    def _wrap_and_load(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """What DDP or DeepSpeed make of the model, with what a checkpoint has."""
        if not divided_layers.is_zero3(self):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            if self.is_deepspeed_enabled and self.accelerator.deepspeed_plugin.zero_stage == 2:
                share_in_order(self.deepspeed.optimizer)
            return prepared
        layers = self.policy.layers
        divided_layers.mark_leaves(layers)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        divided_layers.keep_whole(self.deepspeed, layers)
        return prepared

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not resume_from_checkpoint:
            return self._wrap_and_load(max_steps, train_dataloader, resume_from_checkpoint)
        folder = Path(resume_from_checkpoint)
        # DeepSpeed's engine reads its files in here, the optimizer's state and the schedule are read in here too
        with loading(folder):
            prepared = self._wrap_and_load(max_steps, train_dataloader, resume_from_checkpoint)
            self._load_rng_state(resume_from_checkpoint)  # as the loop will: a damaged one is to be found before the first step
            self.load_extra(folder)
        return prepared

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        optimizer = optimizer or self.optimizer
        own: Any = optimizer
        while not hasattr(own, "defaults"):  # DeepSpeed's has none, but torch's is in it; some schedules read the rate there
            own = own.optimizer
        if own is not optimizer:
            optimizer.defaults = own.defaults
        return with_rates(self.args, num_training_steps, lambda: self.make_schedule(num_training_steps, optimizer))

    def make_schedule(self, num_steps: int, optimizer: Any) -> Any:
        """The learning rate of so many steps, which becomes `lr_scheduler`."""
        return super().create_scheduler(num_steps, optimizer)

    def save_extra(self, folder: Path) -> None:
        """Write a subclass's own files beside the Trainer's."""

    def load_extra(self, folder: Path) -> None:
        """Read back what `save_extra` wrote."""


def _fault_of_disk(error: Exception, folder: Path) -> str | None:
    """The file that could not be written to `folder`, and why; None where that is not what the error says.

    PyTorch and safetensors have errors of their own, without the file's name: PyTorch's is the one written last, and safetensors
    takes its own away.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    name = max(files, key=lambda path: path.stat().st_mtime_ns, default=folder).name
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    elif match := re.search(r"[\w ]+ \(os error \d+\)", text):  # safetensors, which is Rust's
        name, reason = "its .safetensors file", match[0].strip()
    elif any(words in text for words in ("PytorchStreamWriter failed", "unexpected pos", "iostream error")):
        reason = "it could not be written whole; is the disk full?"
    else:
        return None
    named = getattr(error, "filename", None)
    return f"{Path(named).name if isinstance(named, str) else name}: {reason}"
