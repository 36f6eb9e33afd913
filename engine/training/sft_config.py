"""Settings of a supervised fine-tuning run: the Trainer's, with Med-R1's defaults, and only fields that work."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from engine.command.settings import refuse_unsupported, setting


@dataclass
class SFTConfig(TrainingArguments):
    """Supervised fine-tuning: `transformers.TrainingArguments` with Med-R1's settings, and how long prompts and answers may be."""

    output_dir: str = setting("", "Run folder; left out: runs/<recipe>/<time>.")
    learning_rate: float = setting(2e-5, "Peak learning rate.")
    lr_scheduler_type: str = setting("cosine", "How the learning rate changes.")
    warmup_steps: float = setting(0.1, "Steps until the peak, below 1 their share of the run.", aliases=["--warmup_ratio"])
    num_train_epochs: float = setting(1, "Passes over the training rows.")
    per_device_train_batch_size: int = setting(4, "Prompts per process and forward pass.")
    gradient_accumulation_steps: int = setting(16, "Forward passes per optimizer step.")
    gradient_checkpointing: bool = setting(True, "Compute activations again in the backward pass instead of keeping them.")
    bf16: bool | None = setting(None, "Mixed precision. None: where there is a GPU.")
    save_steps: float = setting(100, "Save a checkpoint every so many optimizer steps.")
    logging_steps: float = setting(1, "Log every so many optimizer steps.")
    logging_nan_inf_filter: bool = setting(False, "Replace a NaN loss in the log by the running average.")
    remove_unused_columns: bool = setting(False, "Must stay false: prompts and answers are made of every column.")

    max_prompt_length: int | None = setting(
        None, "Longest prompt in tokens, image tokens included; a longer one is a bad row. None: no limit."
    )
    max_completion_length: int = setting(256, "Longest answer in tokens when the model is evaluated; what it learns may be longer.")

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        self.bf16 = not self.use_cpu if self.bf16 is None else self.bf16
        super().__post_init__()
        refuse_unsupported(self)
