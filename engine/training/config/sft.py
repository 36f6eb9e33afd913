"""Settings of supervised fine-tuning, with Med-R1's defaults."""

from dataclasses import dataclass

from engine.command.settings import setting
from engine.training.config.training import PolicyConfig


@dataclass
class SFTConfig(PolicyConfig):
    """Supervised fine-tuning: `transformers.TrainingArguments` with Med-R1's settings."""

    learning_rate: float = setting(2e-5, "Peak learning rate.")
    lr_scheduler_type: str = setting("cosine", "How the learning rate changes.")
    warmup_steps: float = setting(0.1, "Steps until the peak, below 1 their share of the run.", aliases=["--warmup_ratio"])
    num_train_epochs: float = setting(1, "Passes over the training rows.")
    per_device_train_batch_size: int = setting(4, "Prompts per process and forward pass.")
    gradient_accumulation_steps: int = setting(16, "Forward passes per optimizer step.")
    gradient_checkpointing: bool = setting(True, "Compute activations again in the backward pass instead of keeping them.")
    save_steps: float = setting(100, "Save a checkpoint every so many optimizer steps.")
    max_completion_length: int = setting(
        256, "Longest answer in tokens when the model is evaluated; what it learns may be longer.", at_least=1, at_most=2**17
    )
