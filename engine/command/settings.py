"""Flags that recipes share: which model is trained and what of it, and which questions it learns from and is tested on."""

import importlib.util
import logging
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from engine.errors import InputError

logger = logging.getLogger(__name__)


def setting(default, help: str, **metadata):
    """A dataclass field with a default and the help text of its flag."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """Which model, and what of it is trained."""

    model_name_or_path: str | None = setting(None, "Checkpoint folder or hub name. None: the starter policy.")
    model_revision: str = setting("main", "Branch, tag or commit of a hub checkpoint.")
    dtype: str | None = setting(
        None,
        "Type of the weights. None: float32, which keeps small updates (bfloat16 for the frozen base under LoRA on CUDA).",
        aliases=["--torch_dtype"],
        choices=["float32", "bfloat16", "float16", "auto"],
    )
    attn_implementation: str = setting("sdpa", "Attention of the vision tower; the language model uses the engine's own.")
    min_pixels: int | None = setting(None, "Smallest image area in pixels. None: the checkpoint's.")
    max_pixels: int | None = setting(None, "Largest image area in pixels (Med-R1: 401408). None: the checkpoint's.")
    freeze_vision_modules: bool = setting(False, "Keep the vision tower as it is; features are then computed once per image.")
    use_peft: bool = setting(False, "Train LoRA adapters instead of all weights.")
    lora_r: int = setting(16, "LoRA rank.")
    lora_alpha: int = setting(32, "LoRA scale: updates are multiplied by lora_alpha / lora_r.")
    lora_dropout: float = setting(0.0, "Dropout on the input of the adapters.")
    lora_target_modules: list[str] | None = setting(None, "Adapted layers. None: every linear layer of the language model.")

    def load_options(self, bf16: bool) -> dict:
        """Keyword arguments of `models.loading.load_policy`; `bf16` is the run's mixed precision.

        Flash attention without its package gives way to SDPA, and says so.
        """
        dtype = self.dtype
        if dtype in (None, "auto"):
            dtype = "bfloat16" if self.use_peft and bf16 and torch.cuda.is_available() else "float32"
        attention = self.attn_implementation
        if attention.startswith("flash_attention") and importlib.util.find_spec("flash_attn") is None:
            logger.warning("--attn_implementation %s: flash-attn is not installed; using sdpa", attention)
            attention = "sdpa"
        lora = {
            "r": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules,
        }
        return {
            "dtype": getattr(torch, dtype),
            "attn_implementation": attention,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "revision": self.model_revision,
            "freeze_vision": self.freeze_vision_modules,
            "lora": lora if self.use_peft else None,
        }


@dataclass
class DataArguments:
    """Which questions to learn from and to be tested on."""

    dataset_name: list[str] | None = setting(
        None, "JSON, JSONL, Parquet, save_to_disk or prepared folder with image, problem and solution. None: the starter data."
    )
    dataset_train_split: str = setting("train", "Split of a save_to_disk folder or of a prepared folder.")
    dataset_test_split: str = setting("test", "Split to evaluate on before and after training, where dataset_name has it.")
    eval_dataset_name: list[str] | None = setting(None, "Questions to evaluate on instead. None: the test split, if any.")
    eval_limit: int = setting(500, "Evaluate on at most so many questions; 0: do not evaluate.")
    image_root: str | None = setting(None, "Folder that relative image paths start from. None: that of the file.")
    on_bad_row: str = setting("error", "A bad row ends the run, or is skipped, counted and listed.", choices=["error", "skip"])


def refuse_unsupported(args: TrainingArguments) -> None:
    """Raises InputError for a setting of the Trainer's that a policy's trainer does not have."""
    checks = [
        (args.eval_strategy == "no", "--eval_strategy is not supported: evaluate a checkpoint with the system's _eval recipe"),
        (not args.load_best_model_at_end, "--load_best_model_at_end is not supported: nothing is evaluated during training"),
        (not args.remove_unused_columns, "--remove_unused_columns is not supported: every column is read"),
        (not args.fsdp, "--fsdp is not supported: answers need whole weights on every device; use --deepspeed with ZeRO-2"),
        (not args.label_smoothing_factor, "--label_smoothing_factor is not supported"),
        (not args.torch_compile, "--torch_compile is not supported: the kernels are compiled already"),
        (not args.auto_find_batch_size, "--auto_find_batch_size is not supported"),
        (not args.fp16, "--fp16 is not supported: use --bf16, whose range needs no loss scaling"),
    ]
    refuse(checks)


def refuse(checks: list[tuple[bool, str]]) -> None:
    """Raises InputError with the first message whose condition does not hold."""
    for holds, message in checks:
        if not holds:
            raise InputError(message)
