"""The main recipe: two steps on starter data leave a whole run folder; the published command works; mistakes are one line."""

import json
import os
import socket
import subprocess
import sys

import pytest

from engine.errors import InputError
from recipes.medr1_grpo import main
from tests.conftest import ROOT
from tests.tiny_qwen import save_tiny

FAST = ["--max_steps", "2", "--max_completion_length", "8", "--eval_limit", "8", "--save_steps", "1", "--use_cpu", "true"]
# Med-R1's README, with the module changed and the paths, the length of the run and the tracker made small.
PUBLISHED = (
    "--max_prompt_length 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --logging_steps 1 --bf16 "
    "--report_to none --gradient_checkpointing false --attn_implementation flash_attention_2 --max_pixels 401408 "
    "--num_train_epochs 2 --run_name Qwen2.5 --save_steps 200 --save_only_model true --num_generations 4"
).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """(run folder, headline) of a short run."""
    folder = tmp_path_factory.mktemp("run")
    return folder, main(["--model_name_or_path", model, "--output_dir", str(folder), "--log_completions", *FAST])


def test_a_run_leaves_what_it_promises(finished):
    folder, headline = finished
    expected = {"accuracy_before", "accuracy_after", "reward_first", "reward_last", "seconds", "checkpoint"}
    assert expected <= set(headline) and str(headline["checkpoint"]).endswith("checkpoint-2")
    files = (
        "config.json metrics.jsonl curves.png report.html completions.jsonl evaluation_before.json evaluation_after.json".split()
    )
    assert all((folder / name).stat().st_size > 100 for name in files)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = "reward reward_std rewards/accuracy/mean rewards/format/std kl entropy frac_reward_zero_std frac_advantage_zero "
    logged += "clip_ratio/region_mean completions/mean_length completions/clipped_ratio tokens_per_second seconds/rollout "
    logged += "seconds/reward seconds/train peak_memory_gb loss grad_norm learning_rate"
    assert [row["step"] for row in rows] == [1, 2] and set(logged.split()) <= set(rows[0])
    assert json.loads((folder / "config.json").read_text())["training"]["num_generations"] == 4


def test_without_an_output_folder_a_run_has_its_own(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--max_steps", "1", "--max_completion_length", "4", "--eval_limit", "0", "--save_steps", "1", "--use_cpu", "true"]
    headline = main(["--model_name_or_path", model, *flags])
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/*/report.html")] == [
        f"{headline['checkpoint'].parent}/report.html"
    ]
    assert str(headline["checkpoint"]).startswith("runs/medr1_grpo/20") and len(list(tmp_path.iterdir())) == 1


def test_the_checkpoint_opens_with_transformers_alone(finished):
    code = (
        "import sys; from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer; p = sys.argv[1]; "
        "AutoTokenizer.from_pretrained(p); AutoImageProcessor.from_pretrained(p); "
        "m = AutoModelForImageTextToText.from_pretrained(p); "
        "assert not {'models', 'engine', 'kernels'} & set(sys.modules); print(type(m).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(finished[1]["checkpoint"])], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "Qwen2_5_VLForConditionalGeneration", done.stderr[-2000:]


def test_a_second_run_does_not_overwrite_the_first(finished, model):
    with pytest.raises(InputError, match="already holds checkpoint-2; pass --resume_from_checkpoint true or another --output_dir"):
        main(["--model_name_or_path", model, "--output_dir", str(finished[0]), *FAST])


def test_the_published_command_trains_on_two_processes(model, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    own = [
        "--output_dir",
        str(tmp_path),
        "--model_name_or_path",
        model,
        "--max_steps",
        "2",
        "--max_completion_length",
        "8",
        "--eval_limit",
        "4",
    ]
    command = [sys.executable, *launcher, "-m", "recipes.medr1_grpo", *PUBLISHED, *own]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip())["checkpoint"] == str(tmp_path / "checkpoint-2")
    assert "flash-attn is not installed; using sdpa" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()


def test_lora_and_nothink(model, tmp_path):
    flags = ["--use_peft", "--lora_r", "4", "--template", "nothink", "--compat", "reference", "--freeze_vision_modules"]
    headline = main(["--model_name_or_path", model, "--output_dir", str(tmp_path), *flags, *FAST])
    assert (headline["checkpoint"] / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1e-5"], "unknown flag --learning_rat, did you mean --learning_rate?"),
        (["--dataset_name", "nowhere.json"], "nowhere.json: no such file or folder"),
        (["--num_generations", "1"], "--num_generations 1: expected a number, at least 2"),
        (["--report_to", "wandb"], "--report_to wandb: wandb is not installed"),
        (["--model_name_or_path", "./nowhere"], "--model_name_or_path: ./nowhere: no checkpoint there"),
        (["--max_prompt_length", "20", "--use_cpu", "true"], "row 0: a prompt of"),
        (["--resume_from_checkpoint", "./nowhere", "--use_cpu", "true"], "--resume_from_checkpoint ./nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line(model, tmp_path, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # wherever it is installed
    own = [] if "--model_name_or_path" in flags else ["--model_name_or_path", model]
    with pytest.raises(InputError) as error:
        main(["--output_dir", str(tmp_path / "run"), *own, *flags])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_text_only_checkpoint_ends_with_exit_code_2(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    command = [
        sys.executable,
        "-m",
        "recipes.medr1_grpo",
        "--model_name_or_path",
        str(tmp_path),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("error: --model_name_or_path:") and "text-only checkpoint" in done.stderr
