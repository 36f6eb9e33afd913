"""Stage 2 of skin diagnosis: from stage 1's adapter, by two processes, with boxes scored by masks; mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.data.starter.lesions import build_starter_skin
from engine.errors import InputError
from models.loading import SKIN_STARTER_POLICY
from recipes.skin_grpo import main
from recipes.skin_sft import main as stage_1

ROOT = Path(__file__).resolve().parents[2]
QUICK = "--use_cpu true --warmup_steps 0 --max_completion_length 48 --per_device_train_batch_size 2".split()
QUICK += "--gradient_accumulation_steps 1".split()
SMALL = [*QUICK, "--num_generations", "2", "--eval_limit", "4", "--dataset_name", str(build_starter_skin())]
NAMES = ("diagnosis_accuracy", "region_accuracy", "mean_iou")


def test_it_goes_on_from_the_adapter_of_stage_1(tmp_path):
    # Dropout is off, which the reference never has: the first step's KL says whether both are the same model.
    started = ["--model_name_or_path", str(SKIN_STARTER_POLICY), "--use_peft"]
    sft = [*QUICK, "--eval_limit", "0", "--dataset_name", str(build_starter_skin()), "--max_steps", "1", "--lora_dropout", "0"]
    adapter = stage_1([*started, *sft, "--output_dir", str(tmp_path / "1")])["checkpoint"]
    assert (adapter / "adapter_config.json").is_file()
    flags = [*started, *SMALL, "--stage1_model", str(adapter), "--max_steps", "1", "--output_dir", str(tmp_path / "2")]
    headline = main([*flags, "--learning_rate", "1e-5", "--lora_r", "3"])
    assert all(headline[f"{name}_{when}"] is not None for name in NAMES for when in ("before", "after"))
    trained = json.loads((headline["checkpoint"] / "adapter_config.json").read_text())
    assert trained["r"] == 32  # stage 1's adapter, trained further
    logged = [json.loads(line) for line in (tmp_path / "2" / "metrics.jsonl").read_text().splitlines()]
    assert {f"rewards/{name}/mean" for name in ("diagnosis", "location", "box", "format")} <= set(logged[0])
    assert logged[0]["kl"] == 0  # the reference is stage 1, the adapter included


def test_the_published_rewards_ask_the_published_questions(tmp_path):
    headline = main([*SMALL, "--compat", "reference", "--max_steps", "1", "--eval_limit", "0", "--output_dir", str(tmp_path)])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["task"]["compat"] == "reference" and headline["checkpoint"].is_dir()
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {f"rewards/{name}/mean" for name in ("diagnosis", "spatial", "segmentation")} <= set(logged[0])


def test_two_processes_under_accelerate_by_the_published_configuration(tmp_path):
    folder = build_starter_skin()
    settings = {
        "model_name": str(SKIN_STARTER_POLICY),
        "model_type": "qwen2_5_vl",
        "output_dir": str(tmp_path / "out"),
        "train_image_dir": str(folder / "images"),
        "train_metadata_file": str(folder / "train.json"),
        "training": {"num_epochs": 1, "batch_size": 1, "learning_rate": 1e-5, "total_steps": 2, "warmup_steps": 1},
        "model": {"max_length": 256, "image_size": 112},
        "lora": {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "grpo_settings": {"spatial_tolerance": 5, "iou_threshold": 0.7},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    run = [*launch, "-m", "recipes.skin_grpo", "--config", str(tmp_path / "config.json"), "--use_cpu", "true"]
    run += ["--num_generations", "2", "--max_completion_length", "16"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "config.json: grpo_settings.iou_threshold is not used" in ended.stderr
    last = json.loads(ended.stdout.strip().splitlines()[-1])
    assert Path(last["checkpoint"]).name == "checkpoint-2" and ended.stdout.count('"checkpoint"') == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["lora_target_modules"] == ["q_proj", "v_proj"]


def test_boxes_are_scored_by_masks(tmp_path):
    try:
        headline = main([*SMALL, "--iou", "mask", "--max_steps", "1", "--eval_limit", "2", "--output_dir", str(tmp_path)])
    except InputError as error:
        pytest.skip(str(error))  # LiteMedSAM's weights are not installed
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < logged[0]["rewards/mask/mean"] <= 1 and headline["mean_iou_before"] > 0.3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stage1_model", "nowhere/at/all"], "--stage1_model: nowhere/at/all"),
        (["--sam_ckpt", "sam.pth"], "--sam_ckpt sam.pth: needs --iou mask"),
        (["--iou", "mask", "--sam_model", "sam_vit_b"], "--sam_ckpt is missing: the published weights of sam_vit_b"),
        (["--iou", "mask", "--sam_ckpt", "nowhere.pth"], "--sam_ckpt: nowhere.pth"),
        (["--iou", "mask", "--compat", "reference"], "--iou mask: --compat reference has its own overlap"),
        (["--reward_weights", "1", "1"], "--reward_weights 1.0 1.0: expected 4 numbers"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path):
    with pytest.raises(InputError) as refused:
        main([*flags, "--output_dir", str(tmp_path)])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_gradients_reach_the_policy_through_the_rewards(tmp_path):
    """The published stage 2 cannot take a step (its loss is made without gradients); one step of ours moves the weights."""
    headline = main([*SMALL, "--max_steps", "1", "--eval_limit", "0", "--learning_rate", "1e-3", "--output_dir", str(tmp_path)])
    before, after = (load_file(folder / "model.safetensors") for folder in (SKIN_STARTER_POLICY, headline["checkpoint"]))
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert (before[layer].float() - after[layer].float()).abs().max() > 1e-4
