"""Flags that recipes share: which model is trained and what of it, and which questions it learns from and is tested on."""

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from engine.errors import InputError, input_errors

REQUIRED = MISSING  # in place of a default: the flag must be given
Policy = TypeVar("Policy")
logger = logging.getLogger(__name__)


# What may be said of the numbers of a setting: the key of its metadata, in words, and whether a number keeps to it.
LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", lambda number, limit: number >= limit),
    "more_than": ("more than", lambda number, limit: number > limit),
    "at_most": ("at most", lambda number, limit: number <= limit),
    "less_than": ("less than", lambda number, limit: number < limit),
}
# The keys of models.sam.sam.BUILDERS, which flags are checked against before torch is imported.
SAM_MODELS = ("tiny_sam", "lite_medsam", "sam_med2d", "sam_vit_b", "sam_vit_l", "sam_vit_h")
IMAGE_CACHE = "Folder of decoded images, which are decoded once; off: at every use. None: in the cache folder (VESALIUS_CACHE)."
ALLOW_BURNED_IN = "Take DICOM whose pixels show who the patient is (BurnedInAnnotation is YES)."
LARGEST_FLOAT = 3.4e38  # of float32, which every number of a setting becomes somewhere
LARGEST_INTEGER = 2**31 - 1  # of a setting that names no limit above: what PyTorch and NumPy count with everywhere


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field whose flag has this default and help text.

    `metadata`: the flag's aliases, choices, metavar; and what `check_ranges` holds its numbers to (LIMITS), as `at_least=1`.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def limits_of(kind: type, name: str) -> dict[str, float]:
    """The limits of a setting of the dataclass `kind`: its field's own, on top of those that `kind.RANGES` has for that name."""
    (metadata,) = (declared.metadata for declared in fields(kind) if declared.name == name)
    own = {key: metadata[key] for key in LIMITS if key in metadata}
    return own or getattr(kind, "RANGES", {}).get(name, {})


def check_ranges(kind: type, values: Mapping[str, Any], where: str = "") -> None:
    """Raises InputError, naming flag, value and range, for the first setting of `kind` with a number outside its limits.

    Numbers beyond float32's, or not finite, are always refused. What is no number, nor a list with numbers in it, is left alone.
    """
    for name in [declared.name for declared in fields(kind) if declared.name in values]:
        numbers = values[name] if isinstance(values[name], list | tuple) else [values[name]]
        for number in numbers:
            if isinstance(number, int | float) and not isinstance(number, bool):
                expected = out_of_range(number, limits_of(kind, name))
                if expected:
                    raise InputError(f"{where}--{name} {' '.join(map(str, numbers))}: expected {expected}")


def out_of_range(number: float, limits: Mapping[str, float]) -> str | None:
    """What was expected of a number that is not finite or breaks a limit; None of one that is in order."""
    largest = isinstance(number, int) and not {"at_most", "less_than"} & set(limits)
    if isinstance(number, int) or abs(number) <= LARGEST_FLOAT:
        if all(LIMITS[key][1](number, limit) for key, limit in limits.items()) and not (largest and number > LARGEST_INTEGER):
            return None
    words = [f"{LIMITS[key][0]} {limit}" for key, limit in limits.items()]
    words += [f"at most {LARGEST_INTEGER}"] if largest and number > LARGEST_INTEGER else []
    words += [f"at most {LARGEST_FLOAT}"] if isinstance(number, float) and LARGEST_FLOAT < abs(number) < math.inf else []
    return f"a number, {' and '.join(words)}" if words else "a finite number"


def usable_attention(name: str, *, half: bool) -> str:
    """The attention to use where `name` is asked for; `half`: computed in 16 bits.

    Flash attention gives way to SDPA, with a warning, without its package and where it would be handed float32. "auto" is flash
    attention where it can be had, and SDPA elsewhere.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if name == "auto":
        return "flash_attention_2" if installed and half else "sdpa"
    if name.startswith("flash_attention") and not installed:
        logger.warning("--attn_implementation %s: flash-attn is not installed; using sdpa", name)
        return "sdpa"
    if name.startswith("flash_attention") and not half:
        logger.warning("--attn_implementation %s: it has no float32 (expected --bf16); using sdpa", name)
        return "sdpa"
    return name


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
    min_pixels: int | None = setting(None, "Smallest image area in pixels. None: the checkpoint's.", at_least=1)
    max_pixels: int | None = setting(None, "Largest image area in pixels (Med-R1: 401408). None: the checkpoint's.", at_least=1)
    freeze_vision_modules: bool = setting(False, "Keep the vision tower as it is; features are then computed once per image.")
    use_peft: bool = setting(
        False,
        "Train LoRA adapters instead of all weights. An adapter is trained further, as it is; without the flag it is merged into "
        "its base and all weights are trained.",
    )
    lora_r: int = setting(16, "LoRA rank.", at_least=1, at_most=4096)
    lora_alpha: int = setting(32, "LoRA scale: updates are multiplied by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = setting(0.0, "Dropout on the input of the adapters.", at_least=0, less_than=1)
    lora_target_modules: list[str] | None = setting(
        None, "Adapted layers: ends of their names, or all-linear. None: every linear layer of the language model."
    )

    def __post_init__(self):
        check_ranges(ModelArguments, vars(self))
        refuse([(self.use_peft or not self.load_in_4bit, "--load_in_4bit needs --use_peft: quantized weights cannot be trained")])
        pixels = self.min_pixels is None or self.max_pixels is None or self.min_pixels <= self.max_pixels
        refuse([(pixels, f"--min_pixels {self.min_pixels}: expected at most --max_pixels, {self.max_pixels}")])

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
        """Keyword arguments of `models.loading.load_policy`; `bf16` is the run's mixed precision."""
        import torch

        dtype = self.dtype
        if dtype in (None, "auto"):
            dtype = "bfloat16" if self.use_peft and bf16 and torch.cuda.is_available() else "float32"
        attention = usable_attention(self.attn_implementation, half=dtype != "float32" or bf16)
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
    eval_limit: int = setting(500, "Evaluate on at most so many questions, evenly spread; 0: do not evaluate.", at_least=0)
    image_root: str | None = setting(None, "Folder that relative image paths start from. None: that of the file.")
    on_bad_row: str = setting("error", "A bad row ends the run, or is skipped, counted and listed.", choices=["error", "skip"])

    def __post_init__(self):
        check_ranges(DataArguments, vars(self))


def refuse(checks: list[tuple[bool, str]]) -> None:
    """Raises InputError with the first message whose condition does not hold."""
    for holds, message in checks:
        if not holds:
            raise InputError(message)
