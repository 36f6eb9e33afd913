"""A published configuration file trains as it stands: each key is a setting of ours, or named in the log as left out."""

import json
import logging

import pytest

from engine.command.arguments import parse_arguments
from engine.command.lesion_settings import PUBLISHED_KEYS, OverlapArguments
from engine.command.settings import ModelArguments
from engine.data.lesion_splits import LesionArguments
from engine.errors import InputError
from engine.training.config.grpo import GRPOConfig
from engine.training.config.sft import SFTConfig
from recipes.skin_grpo import SkinGRPOArguments

STAGE_1 = {
    "model_name": "Qwen/Qwen2-VL-2B-Instruct",
    "train_image_dir": "HAM/images",
    "spatial_dataset_file": "HAM/ham10000_with_spatial_data.json",
    "output_dir": "./qwen2_5_vl_trained",
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 512,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "include_spatial_descriptions": True,
    "spatial_description_ratio": 0.2,
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "seed": 42,
}
STAGE_2 = {
    "model_name": "Qwen/Qwen2.5-VL-3B-Instruct",
    "model_type": "qwen2_5_vl",
    "training_stage": "stage2_grpo",
    "output_dir": "./stage2",
    "train_image_dir": "HAM/images",
    "train_metadata_file": "HAM/ham10000_with_spatial_data.json",
    "training": {
        "num_epochs": 10,
        "batch_size": 2,
        "learning_rate": 1e-5,
        "weight_decay": 0.01,
        "warmup_steps": 50,
        "total_steps": 500,
        "gradient_accumulation_steps": 8,
        "save_every": 2,
        "seed": 42,
    },
    "model": {"max_length": 256, "image_size": 224, "use_fp16": True, "use_device_map": True, "mixed_precision": True},
    "lora": {"use_lora": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "grpo_settings": {"spatial_tolerance": 5, "iou_threshold": 0.7},
}
STAGE_2_HF = {
    "hf_dataset_name": "abaryan/ham10000_bbox",
    "train_limit": 1000,
    "base_model_name": "Qwen/Qwen2-VL-2B-Instruct",
    "stage1_model_path": "./qwen2vl-sft",
    "output_dir": "./stage2_hf",
    "max_length": 512,
    "report_to": "none",
    "training": {"num_epochs": 2, "batch_size": 16, "learning_rate": 5e-6, "warmup_steps": 100},
    "lora": {"r": 32, "alpha": 64, "dropout": 0.1, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "grpo_settings": {"reward_weights": {"diagnosis": 0.5, "spatial": 0.3, "segmentation": 0.2, "quality": 0.1}},
}


def parse(folder, content, kinds, *flags):
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    argv = ["--config", str(path), "--use_cpu", "true", *flags]
    return parse_arguments(kinds, argv, recipe="skin", published=PUBLISHED_KEYS)


def test_stage_1(tmp_path):
    data, model, args = parse(tmp_path, STAGE_1, (LesionArguments, ModelArguments, SFTConfig))
    assert data.dataset_name == ["HAM/ham10000_with_spatial_data.json"] and data.image_root == "HAM/images"
    assert data.spatial_description_ratio == 0.2 and data.question is None
    assert model.model_name_or_path == "Qwen/Qwen2-VL-2B-Instruct"
    assert (model.use_peft, model.lora_r, model.lora_alpha, model.lora_dropout) == (True, 32, 64, 0.05)
    assert (args.num_train_epochs, args.learning_rate, args.per_device_train_batch_size) == (3, 5e-5, 1)
    assert (args.gradient_accumulation_steps, args.max_prompt_length, args.output_dir) == (1, 512, "./qwen2_5_vl_trained")
    assert (args.warmup_steps, args.weight_decay, args.max_grad_norm, args.seed) == (100, 0.01, 1.0, 42)
    without = parse(tmp_path, STAGE_1 | {"include_spatial_descriptions": False}, (LesionArguments, ModelArguments, SFTConfig))[0]
    assert without.question == "diagnosis"


def test_stage_2(tmp_path, caplog):
    kinds = (SkinGRPOArguments, LesionArguments, ModelArguments, GRPOConfig)
    with caplog.at_level(logging.WARNING):
        _, data, model, args = parse(tmp_path, STAGE_2, kinds)
    assert data.dataset_name == ["HAM/ham10000_with_spatial_data.json"] and data.image_root == "HAM/images"
    assert (args.num_train_epochs, args.max_steps, args.per_device_train_batch_size) == (10, 500, 2)
    assert (args.gradient_accumulation_steps, args.learning_rate, args.weight_decay, args.warmup_steps) == (8, 1e-5, 0.01, 50)
    assert (args.max_prompt_length, model.max_pixels, args.seed) == (256, 224 * 224, 42)
    assert (model.use_peft, model.lora_r, model.lora_alpha, model.lora_dropout) == (True, 16, 32, 0.1)
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    left_out = {line.split(": ")[1].removesuffix(" is not used") for line in caplog.messages}
    assert left_out == {
        "model_type",
        "training_stage",
        "training.save_every",
        "model.use_fp16",
        "model.use_device_map",
        "grpo_settings.spatial_tolerance",
        "grpo_settings.iou_threshold",
    }


def test_stage_2_of_the_hub(tmp_path):
    kinds = (SkinGRPOArguments, LesionArguments, ModelArguments, GRPOConfig)
    own, data, model, args = parse(tmp_path, STAGE_2_HF, kinds, "--learning_rate", "1e-6")
    assert own.stage1_model == "./qwen2vl-sft" and model.model_name_or_path == "Qwen/Qwen2-VL-2B-Instruct"
    assert (data.dataset_name, data.question, data.limit) == (["abaryan/ham10000_bbox"], "tagged", 1000)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout, len(model.lora_target_modules)) == (32, 64, 0.1, 4)
    assert args.reward_weights == [0.5, 0.3, 0.2, 0.1]  # diagnosis, location, box, format
    assert args.learning_rate == 1e-6  # flags go on top


@pytest.mark.parametrize(
    "change, words",
    [
        ({"training": 3}, "training: expected settings within it"),
        ({"training": {"num_epoch": 3}}, r"training\.num_epoch'"),
        ({"model": {"image_size": "large"}}, r"model\.image_size: "),
        ({"model": {"image_size": -8}}, r"model\.image_size: "),
        ({"model": {"mixed_precision": "fp8"}}, "mixed_precision: 'fp8' .expected"),
        ({"include_spatial_descriptions": 3}, "include_spatial_descriptions: 3 .expected true or false"),
        ({"grpo_settings": {"reward_weights": {"beauty": 1}}}, "reward_weights: 'beauty' .expected diagnosis, spatial"),
        ({"grpo_settings": {"reward_weights": 3}}, "reward_weights: "),
        ({"lora": {"lora_rank": 3}}, r"lora\.lora_rank'"),
        ({"training": {"learning_rate": "fast"}}, r"training\.learning_rate: 'fast' .expected a number"),
        ({"learning_rate": 1e-5, "training": {"learning_rate": 1e-5}}, r"training\.learning_rate: given twice"),
    ],
)
def test_what_has_no_meaning_is_one_line_that_names_it(tmp_path, change, words):
    with pytest.raises(InputError, match=words) as refused:
        parse(tmp_path, change, (SkinGRPOArguments, LesionArguments, ModelArguments, GRPOConfig))
    assert "\n" not in str(refused.value)


def test_a_recipe_without_published_files_takes_no_section(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {seed: 3}")
    with pytest.raises(InputError, match="unknown setting 'training'"):
        parse_arguments(OverlapArguments, ["--config", str(tmp_path / "c.yaml")], recipe="demo")
