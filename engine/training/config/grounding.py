"""Settings of supervised fine-tuning with masks, with Uni-MedVLM's defaults."""

from dataclasses import dataclass

from engine.command.settings import setting
from engine.training.config.sft import SFTConfig


@dataclass
class GroundingConfig(SFTConfig):
    """Supervised fine-tuning whose answers may draw masks: what each part of the loss weighs."""

    ce_weight: float = setting(1.0, "Weight of the answer's tokens.", at_least=0)
    bce_weight: float = setting(1.0, "Weight of the masks' cross entropy.", at_least=0)
    dice_weight: float = setting(1.0, "Weight of their Dice loss (MedPLIB: 5).", at_least=0)
    iou_weight: float = setting(0.0, "Weight of the error of the IoU that the model expects.", at_least=0)
    focal_weight: float = setting(0.0, "Weight of their focal loss (MedPLIB: 1).", at_least=0)
