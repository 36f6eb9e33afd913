"""Settings of segmentation training, with PRS-Med's defaults."""

from dataclasses import dataclass

from engine.command.settings import refuse, setting
from engine.training.config.training import TrainingConfig
from engine.training.losses.masks import MASK_LOSSES

MIN_LEARNING_RATE = 1e-6
# Flags of the published scripts that are not taken, and what there is instead.
REFUSED = {
    "--device": "CUDA_VISIBLE_DEVICES chooses the GPU, --use_cpu the CPU",
    "--specific_dataset": "--ann_paths annotations/NAME.csv takes one set",
    "--image_size": "the image encoder sees 1024 x 1024 pixels, as TinySAM's weights do",
    "--lambda_seg": "the mask's loss has the weight 1, against --text_weight and --class_weight",
    "--compile_model": "the kernels are compiled already",
}


@dataclass
class MaskConfig(TrainingConfig):
    """Segmentation: `transformers.TrainingArguments` with PRS-Med's settings, and what the losses need."""

    learning_rate: float = setting(1e-4, "Peak learning rate; a cosine takes it to 1e-6.")
    lr_scheduler_type: str = setting("cosine_with_min_lr", "How the learning rate changes.")
    weight_decay: float = setting(1e-5, "Weight decay of AdamW (0.01 in the paper, 1e-5 in its code).")
    adam_epsilon: float = setting(1e-6, "Epsilon of AdamW.")
    output_dir: str = setting("", "Run folder; left out: runs/<recipe>/<time>.", aliases=["--save_dir", "--checkpoint_dir"])
    bf16: bool | None = setting(None, "Mixed precision. None: where there is a GPU.", aliases=["--use_amp"])  # type: ignore[assignment]
    gradient_accumulation_steps: int = setting(1, "Passes per optimizer step.", aliases=["--grad_accum_steps"])
    max_grad_norm: float = setting(1.0, "Longest gradient.", aliases=["--grad_clip_norm"])
    per_device_train_batch_size: int = setting(4, "Also --batch_size: images per process and pass.", aliases=["--batch_size"])
    num_train_epochs: float = setting(20, "Also --epochs: passes over the training rows.", aliases=["--epochs", "--num_epochs"])
    save_total_limit: int | None = setting(2, "Checkpoints to keep.")
    save_strategy: str = setting("epoch", "When to save a checkpoint: no, epoch or steps.")

    mask_loss: str = setting(
        "structure",
        "PraNet's structure loss, the same as PRS-Med's code computes it, or its paper's cross entropy and Dice.",
        choices=list(MASK_LOSSES),
    )
    class_weight: float = setting(0.5, "Weight of naming the data set from the image.", at_least=0)
    class_epochs: float = setting(5, "Epochs in which it counts.", at_least=0)
    text_weight: float = setting(
        1.0, "Weight of the answer's tokens (0.5 in the paper, 1 in its code).", at_least=0, aliases=["--lambda_txt"]
    )
    cosine_epochs: int | None = setting(
        None,
        "Epochs in which the cosine falls, a whole epoch at a time (PRS-Med's code: 20). None: the run, step by step.",
        at_least=1,
    )

    def __post_init__(self):
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = self._lowest()
        super().__post_init__()
        if self.cosine_epochs is not None:
            self.follow_cosine(self.cosine_epochs)
        known = ", ".join(MASK_LOSSES)
        refuse([(self.mask_loss in MASK_LOSSES, f"--mask_loss {self.mask_loss}: expected one of {known}")])

    def follow_cosine(self, epochs: int) -> None:
        """Set `cosine_epochs`; InputError where it takes the place of settings that say otherwise."""
        self.cosine_epochs = epochs
        kind = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        cosine = f"--cosine_epochs {epochs} is a schedule of its own"
        refuse(
            [
                (kind == "cosine_with_min_lr", f"{cosine}: --lr_scheduler_type {kind} has no place beside it"),
                (self.lr_scheduler_kwargs in (None, self._lowest()), f"{cosine}: --lr_scheduler_kwargs has no place beside it"),
                (
                    not self.warmup_steps,
                    f"{cosine}, without a warm-up: --warmup_steps {self.warmup_steps:g} has no place beside it",
                ),
            ]
        )

    def _lowest(self) -> dict[str, float]:
        return {"min_lr": min(MIN_LEARNING_RATE, self.learning_rate)}
