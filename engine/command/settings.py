"""Flags that recipes share: which model is trained and what of it, and which questions it learns from and is tested on."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

from engine.errors import InputError, input_errors

REQUIRED = MISSING  # in place of a default: the flag must be given
Policy = TypeVar("Policy")
logger = logging.getLogger(__name__)


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field whose flag has this default and help text; `metadata`: the flag's aliases, choices, metavar."""
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Which model, and what of it is trained."""

    model_name_or_path: str | None = setting(None, "Folder or hub name of a checkpoint or an adapter. None: the starter policy.")
    model_revision: str = setting("main", "Branch, tag or commit of a hub checkpoint.")
    base_model_name_or_path: str | None = setting(None, "Base model of an adapter. None: what its adapter_config.json names.")
    load_in_4bit: bool = setting(False, "Quantize the frozen base (QLoRA); needs --use_peft and bitsandbytes.")
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
    use_peft: bool = setting(
        False,
        "Train LoRA adapters instead of all weights. An adapter is trained further, as it is; without the flag it is merged into "
        "its base and all weights are trained.",
    )
    lora_r: int = setting(16, "LoRA rank.")
    lora_alpha: int = setting(32, "LoRA scale: updates are multiplied by lora_alpha / lora_r.")
    lora_dropout: float = setting(0.0, "Dropout on the input of the adapters.")
    lora_target_modules: list[str] | None = setting(
        None, "Adapted layers: ends of their names, or all-linear. None: every linear layer of the language model."
    )

    def __post_init__(self):
        refuse([(self.use_peft or not self.load_in_4bit, "--load_in_4bit needs --use_peft: quantized weights cannot be trained")])

    def load(self, load_policy: Callable[..., Policy], bf16: bool, *, use_cpu: bool = False) -> Policy:
        """`load_policy(path or None, **load_options(bf16))`; the starter policy (None) computes on one thread where it is on a CPU.

        InputError if the checkpoint cannot be used.
        """
        import torch  # here, as below: the flags are read before torch is needed

        from engine.device import one_thread_if_small

        device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
        one_thread_if_small(self.model_name_or_path is None, device)
        with input_errors("--model_name_or_path"):
            return load_policy(self.model_name_or_path, **self.load_options(bf16))

    def load_options(self, bf16: bool) -> dict[str, Any]:
        """Keyword arguments of `models.loading.load_policy`; `bf16` is the run's mixed precision.

        Flash attention without its package gives way to SDPA, with a warning.
        """
        import torch

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
            "merge_adapter": not self.use_peft,
            "base_model": self.base_model_name_or_path,
            "load_in_4bit": self.load_in_4bit,
        }


@dataclass
class DataArguments:
    """Which questions to learn from and to be tested on."""

    dataset_name: list[str] | None = setting(
        None, "JSON, CSV, TSV, Parquet, save_to_disk or prepared folder, see docs/your_own_data.md. None: the starter data."
    )
    dataset_train_split: str = setting("train", "Split of a save_to_disk folder or of a prepared folder.")
    dataset_test_split: str = setting("test", "Split to evaluate on before and after training, where dataset_name has it.")
    eval_dataset_name: list[str] | None = setting(None, "Questions to evaluate on instead. None: the test split, if any.")
    eval_limit: int = setting(500, "Evaluate on at most so many questions, evenly spread; 0: do not evaluate.")
    image_root: str | None = setting(None, "Folder that relative image paths start from. None: that of the file.")
    on_bad_row: str = setting("error", "A bad row ends the run, or is skipped, counted and listed.", choices=["error", "skip"])


def refuse(checks: list[tuple[bool, str]]) -> None:
    """Raises InputError with the first message whose condition does not hold."""
    for holds, message in checks:
        if not holds:
            raise InputError(message)
