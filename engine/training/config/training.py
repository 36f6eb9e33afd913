"""What the settings of all trainers share: the Trainer's own, and only fields that work."""

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from engine.command.settings import ALLOW_BURNED_IN, IMAGE_CACHE, check_ranges, refuse, setting
from engine.command.training_arguments import TrainingArguments
from engine.data.loaders.dali import require_dali
from engine.data.loaders.workers import check_worker_settings
from engine.errors import InputError
from engine.training.config.compilation import take_compile_settings
from engine.training.config.optimization import check_learning
from engine.training.config.trainer_values import check_values
from kernels.prefix_providers import PROVIDERS, unusable

# What the numbers of `transformers.TrainingArguments` are held to, whichever class of ours declares them anew.
TRAINER_RANGES: dict[str, dict[str, float]] = {
    "per_device_train_batch_size": {"at_least": 1},
    "per_device_eval_batch_size": {"at_least": 1},
    "gradient_accumulation_steps": {"at_least": 1},
    "eval_accumulation_steps": {"at_least": 1},
    "learning_rate": {"more_than": 0},
    "weight_decay": {"at_least": 0},
    "adam_beta1": {"at_least": 0, "less_than": 1},
    "adam_beta2": {"at_least": 0, "less_than": 1},
    "adam_epsilon": {"more_than": 0},
    "max_grad_norm": {"at_least": 0},
    "num_train_epochs": {"more_than": 0, "at_most": 1_000_000},
    "max_steps": {"at_least": -1},
    "warmup_steps": {"at_least": 0},
    "warmup_ratio": {"at_least": 0, "at_most": 1},
    "label_smoothing_factor": {"at_least": 0, "less_than": 1},
    "neftune_noise_alpha": {"at_least": 0},
    "logging_steps": {"more_than": 0},
    "save_steps": {"more_than": 0},
    "save_total_limit": {"at_least": 1},
    "eval_steps": {"more_than": 0},
    "eval_delay": {"at_least": 0},
    "seed": {"at_least": 0, "at_most": 2**32 - 1},
    "data_seed": {"at_least": 0, "at_most": 2**32 - 1},
    "dataloader_num_workers": {"at_least": 0, "at_most": 1024},
    "dataloader_prefetch_factor": {"at_least": 1},
    "torch_empty_cache_steps": {"at_least": 1},
    "ddp_bucket_cap_mb": {"at_least": 1},
    "ddp_timeout": {"at_least": 1},
    "local_rank": {"at_least": -1},
}


@dataclass
class TrainingConfig(TrainingArguments):
    """The training loop: `transformers.TrainingArguments` without what our trainers do not have."""

    RANGES: ClassVar[dict[str, Any]] = TRAINER_RANGES

    output_dir: str = setting("", "Run folder; left out: runs/<recipe>/<time>.")
    bf16: bool | None = setting(None, "Mixed precision. None: where there is a GPU.")  # type: ignore[assignment]
    logging_steps: float = setting(1, "Log every so many optimizer steps.")
    logging_nan_inf_filter: bool = setting(False, "Replace a NaN loss in the log by the running average.")
    image_cache: str | None = setting(None, IMAGE_CACHE, metavar="DIR|off")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)
    loader: str = setting(
        "torch",
        "Who decodes images in training: torch is the data loader's workers, dali NVIDIA's DALI, JPEG on the GPU where there is "
        "one (whose decoder may round otherwise; on a CPU the pixels are the same).",
        choices=("torch", "dali"),
    )
    remove_unused_columns: bool = setting(False, "Must stay false: every column is read.")

    def __post_init__(self):
        check_ranges(type(self), vars(self))
        check_values(self)
        check_worker_settings(self)
        if self.loader == "dali":
            require_dali()
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        self.bf16 = not self.use_cpu if self.bf16 is None else self.bf16
        if self.use_liger_kernel:  # its fused cross entropy replaces the model's forward, which is where the engine's head comes in
            self.liger_kernel_config = {"fused_linear_cross_entropy": False} | (self.liger_kernel_config or {})
        compiled = take_compile_settings(self)
        super().__post_init__()
        if compiled:
            self.torch_compile, (self.torch_compile_backend, self.torch_compile_mode) = True, compiled
        if self.deepspeed:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()  # else transformers divides what it loads by ZeRO-3: see engine/training/zero/
        has_liger = importlib.util.find_spec("liger_kernel") is not None
        losses = [name for name in ("cross_entropy", "fused_linear_cross_entropy") if (self.liger_kernel_config or {}).get(name)]
        refuse(
            [
                (
                    not (self.use_liger_kernel and losses),
                    f"--liger_kernel_config: {' and '.join(losses)} would take the place of this engine's loss; leave it out",
                ),
                (self.max_steps != 0, "--max_steps 0: expected at least 1, or -1 for --num_train_epochs"),
                (
                    not 1 <= self.max_steps < self.warmup_steps,
                    f"--warmup_steps {self.warmup_steps:g}: expected at most --max_steps, {self.max_steps}",
                ),
                (
                    self.eval_strategy == "no",
                    "--eval_strategy is not supported: evaluate a checkpoint with an _eval recipe",
                ),
                (
                    not self.load_best_model_at_end,
                    "--load_best_model_at_end is not supported: training evaluates nothing",
                ),
                (not self.remove_unused_columns, "--remove_unused_columns is not supported: every column is read"),
                (not self.fsdp, "--fsdp is not supported: whole weights are needed on every device; use --deepspeed with ZeRO-2"),
                (not self.label_smoothing_factor, "--label_smoothing_factor is not supported"),
                (not self.auto_find_batch_size, "--auto_find_batch_size is not supported"),
                (not self.fp16, "--fp16 is not supported: use --bf16, whose range needs no loss scaling"),
                (not self.use_liger_kernel or not self.use_cpu, "--use_liger_kernel needs a GPU: its kernels are Triton's"),
                (
                    not self.use_liger_kernel or has_liger,
                    "--use_liger_kernel: liger-kernel is not installed (pip install 'vesalius[gpu]')",
                ),
            ]
        )
        check_learning(self)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As of `transformers`; but a share of the steps is never all of them, so that a run of one step learns."""
        steps = super().get_warmup_steps(num_training_steps)
        return steps if self.warmup_steps >= 1 else min(steps, num_training_steps - 1)

    @property
    def n_gpu(self) -> int:
        """GPUs of this process, at most one: with more the Trainer would split prompts as if they were tensors (DataParallel)."""
        return min(1, super().n_gpu)


@dataclass
class PolicyConfig(TrainingConfig):
    """Prompts and answers: how long they may be, and how their rows attend."""

    max_prompt_length: int | None = setting(
        None, "Longest prompt in tokens, image tokens included; a longer one is a bad row. None: no limit.", at_least=1
    )
    max_completion_length: int = setting(256, "Longest answer in tokens.", at_least=1, at_most=2**17)
    attention: str = setting(
        "prefix",
        "How the language model attends in training and prefill: prefix is the engine's own kernels, sdpa PyTorch's attention with "
        "a mask; flash (flash-attn) and xformers need their packages, a GPU and bf16.",
        choices=PROVIDERS,
    )

    def __post_init__(self):
        super().__post_init__()
        if reason := unusable(self.attention):
            raise InputError(f"--attention {self.attention}: {reason}")
