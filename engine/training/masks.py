"""Training a model that answers a question with a mask and a sentence (PRS-Med, arXiv 2505.11872): losses, settings, Trainer.

    loss = mask loss + class_weight * CE(data set)  [the first class_epochs only]  + text_weight * CE(answer tokens)

The mask loss is PraNet's structure loss, or binary cross entropy and Dice as the paper has it. With p = sigmoid(logits), mask m and
weights w = 1 + 5 |mean of m over 31 x 31 - m|, which are largest at edges, all sums over an image's pixels:

    structure loss = sum(w BCE) / sum(w)  +  1 - (sum(w p m) + 1) / (sum(w (p + m - p m)) + 1)

Shape letters: B batch, S side of the masks, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from engine.command.settings import refuse, setting
from engine.errors import InputError
from engine.training.checkpoints import WholeCheckpoints

MASK_LOSSES = ("structure", "bce_dice")
MIN_LEARNING_RATE = 1e-6
REFERENCE_PERIOD = 20  # epochs from the highest learning rate to the lowest, whatever --epochs says


def structure_loss(logits: Tensor, masks: Tensor, edge_weights: bool = True) -> Tensor:
    """logits and masks [B, 1, S, S] -> mean over the batch.

    `edge_weights=False` is what the published code computes: its weights cancel out of the cross entropy, not of the other term.
    """
    rows = F.avg_pool2d(masks, (31, 1), stride=1, padding=(15, 0))  # a square's mean is the mean of its rows' means
    weights = 1 + 5 * (F.avg_pool2d(rows, (1, 31), stride=1, padding=(0, 15)) - masks).abs()
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    bce = (weights * bce).sum((2, 3)) / weights.sum((2, 3)) if edge_weights else bce.mean()
    p = logits.sigmoid()
    both = (weights * p * masks).sum((2, 3))
    either = (weights * (p + masks)).sum((2, 3)) - both
    return (bce + 1 - (both + 1) / (either + 1)).mean()


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the batch of 1 - (2 sum(p m) + 1) / (sum(p) + sum(m) + 1), sums over an image's pixels."""
    p = logits.sigmoid()
    both, all_of_both = (p * masks).sum((1, 2, 3)), (p + masks).sum((1, 2, 3))
    return (1 - (2 * both + 1) / (all_of_both + 1)).mean()


def mask_loss(kind: str, logits: Tensor, masks: Tensor, compat: str = "default") -> Tensor:
    """`kind` is one of MASK_LOSSES; computed in float32."""
    logits = logits.float()
    if kind == "structure":
        return structure_loss(logits, masks, edge_weights=compat == "default")
    return F.binary_cross_entropy_with_logits(logits, masks) + dice_loss(logits, masks)


def counted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100; 0 where there is none. logits [..., V], labels [...]."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


@dataclass
class SegmentationConfig(TrainingArguments):
    """Segmentation: `transformers.TrainingArguments` with the published settings, and what the losses need."""

    output_dir: str = setting("", "Run folder; left out: runs/<recipe>/<time>.")
    learning_rate: float = setting(1e-4, "Peak learning rate; a cosine takes it to 1e-6.")
    lr_scheduler_type: str = setting("cosine_with_min_lr", "How the learning rate changes.")
    weight_decay: float = setting(1e-5, "Weight decay of AdamW (0.01 in the paper, 1e-5 in its code).")
    adam_epsilon: float = setting(1e-6, "Epsilon of AdamW.")
    per_device_train_batch_size: int = setting(4, "Also --batch_size: images per process and pass.", aliases=["--batch_size"])
    num_train_epochs: float = setting(20, "Also --epochs: passes over the training rows.", aliases=["--epochs"])
    bf16: bool | None = setting(None, "Mixed precision. None: where there is a GPU.")
    save_total_limit: int | None = setting(2, "Checkpoints to keep.")
    save_strategy: str = setting("epoch", "When to save a checkpoint: no, epoch or steps.")
    logging_steps: float = setting(1, "Log every so many optimizer steps.")
    logging_nan_inf_filter: bool = setting(False, "Replace a NaN loss in the log by the running average.")
    remove_unused_columns: bool = setting(False, "Must stay false: the batch is made of every column.")

    mask_loss: str = setting("structure", "PraNet's structure loss, or the paper's cross entropy and Dice.", choices=MASK_LOSSES)
    class_weight: float = setting(0.5, "Weight of naming the data set from the image.")
    class_epochs: float = setting(5, "Epochs in which it counts.")
    text_weight: float = setting(1.0, "Weight of the answer's tokens (0.5 in the paper, 1 in its code).")
    compat: str = setting(
        "default", "Train well, or with the quirks of the published code (see the recipe).", choices=["default", "reference"]
    )

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        self.bf16 = not self.use_cpu if self.bf16 is None else self.bf16
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr": min(MIN_LEARNING_RATE, self.learning_rate)}
        super().__post_init__()
        checks = [
            (self.mask_loss in MASK_LOSSES, f"--mask_loss {self.mask_loss}: expected one of {', '.join(MASK_LOSSES)}"),
            (self.compat in ("default", "reference"), f"--compat {self.compat}: expected default or reference"),
            (self.eval_strategy == "no", "--eval_strategy is not supported: evaluate a checkpoint with recipes.prs_med_eval"),
            (not self.load_best_model_at_end, "--load_best_model_at_end is not supported: nothing is evaluated during training"),
            (not self.remove_unused_columns, "--remove_unused_columns is not supported: the batch is made of every column"),
            (not self.fsdp, "--fsdp is not supported; use --deepspeed with ZeRO-2"),
            (not self.label_smoothing_factor, "--label_smoothing_factor is not supported"),
            (not self.fp16, "--fp16 is not supported: use --bf16, whose range needs no loss scaling"),
        ]
        refuse(checks)


class Output(Protocol):
    """mask_logits [B, 1, S, S], class_logits [B, classes], token_logits [B, T, V] with token_labels [B, T] (-100: not counted)."""

    mask_logits: Tensor
    class_logits: Tensor
    token_logits: Tensor
    token_labels: Tensor


class SegmentationTrainer(WholeCheckpoints, Trainer):
    """`Trainer` with the loss above.

    `model(**batch)` gives an `Output`; it has `save_pretrained(folder)` and `load_trained(folder)`, and optionally
    `gradient_checkpointing_enable`. `collate(rows)` gives a batch with masks [B, 1, S, S] and class_labels [B] beside the model's.
    """

    args: SegmentationConfig

    def __init__(self, model: nn.Module, collate: Callable, args: SegmentationConfig, train_dataset, **kwargs):
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collate, **kwargs)
        if self.is_deepspeed_enabled and self.accelerator.deepspeed_plugin.zero_stage == 3:
            raise InputError("--deepspeed: ZeRO-3 is not supported, since checkpoints need whole weights; use ZeRO-2")
        self.model_accepts_loss_kwargs = False
        self.terms: list[Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        inputs = dict(inputs)
        masks, class_labels = inputs.pop("masks"), inputs.pop("class_labels")
        output = model(**inputs)
        # The class term stays in the sum when its time is over, so that every parameter has a gradient in every process.
        class_weight = self.args.class_weight if (self.state.epoch or 0) < self.args.class_epochs else 0.0
        terms = torch.stack(
            [
                mask_loss(self.args.mask_loss, output.mask_logits, masks, self.args.compat),
                counted_cross_entropy(output.class_logits, class_labels),
                counted_cross_entropy(output.token_logits, output.token_labels),
            ]
        )
        self.terms.append(terms.detach())
        return (terms * terms.new_tensor([1.0, class_weight, self.args.text_weight])).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.terms:
            means = self.accelerator.reduce(torch.stack(self.terms).mean(0), "mean").tolist()
            logs = logs | dict(zip(("loss/mask", "loss/class", "loss/text"), means, strict=True))
            self.terms.clear()
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.compat == "default":
            return super().create_scheduler(num_training_steps, optimizer)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps = math.ceil(len(self.train_dataset) / batch)
        low = MIN_LEARNING_RATE / self.args.learning_rate

        def factor(step: int) -> float:
            return low + (1 - low) * (1 + math.cos(math.pi * (step // steps) / REFERENCE_PERIOD)) / 2

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def floating_point_ops(self, inputs) -> int:
        return 0

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.model.load_trained(Path(resume_from_checkpoint))
