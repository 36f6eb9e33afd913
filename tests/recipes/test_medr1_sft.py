"""The fine-tuning recipe: two steps leave a whole run folder and go on where they stopped; mistakes are one line."""

import json
import pickle

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from engine.errors import InputError
from engine.tasks.lessons import respond
from recipes.medr1_sft import main, task
from tests.tiny_qwen import save_tiny

FAST = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_completion_length 6 --eval_limit 4".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_a_run_leaves_what_it_promises_and_resumes_bit_for_bit(model, tmp_path):
    """Two steps, and one step that is stopped and resumed: equal weights; a whole folder, and a checkpoint for transformers."""
    flags = ["--model_name_or_path", model, "--max_steps", "2", "--save_steps", "1", "--use_cpu", "true", *FAST]
    headline = main(["--output_dir", str(tmp_path), *flags])
    names = {"accuracy_before", "accuracy_after", "loss_first", "loss_last", "seconds", "checkpoint", "by_modality_after"}
    assert names <= set(headline) and headline["checkpoint"] == tmp_path / "checkpoint-2"
    files = "config.json metrics.jsonl curves.png report.html evaluation_before.json evaluation_after.json".split()
    assert all((tmp_path / name).stat().st_size > 100 for name in files)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = "loss mean_token_accuracy entropy answer_tokens tokens_per_second seconds/step peak_memory_gb grad_norm learning_rate"
    assert [row["step"] for row in rows] == [1, 2] and set(logged.split()) <= set(rows[0])
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer(f"<answer> {letter} </answer><|im_end|>").input_ids) for letter in "ABCDE"]
    counts = rows[0]["answer_tokens"], rows[1]["answer_tokens"] - rows[0]["answer_tokens"]  # four answers a step
    assert all(4 * min(lengths) <= count <= 4 * max(lengths) for count in counts)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["training"]["learning_rate"] == 2e-5 and config["training"]["warmup_steps"] == 0.1
    assert json.loads((tmp_path / "evaluation_after.json").read_text())["template"] == "medr1_train_nothink"

    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    again = main(["--output_dir", str(tmp_path), "--resume_from_checkpoint", str(tmp_path / "checkpoint-1"), *flags])
    resumed = AutoModelForImageTextToText.from_pretrained(again["checkpoint"]).state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_the_published_prompt_and_target_with_lora(model, tmp_path):
    flags = [
        "--use_peft",
        "--compat",
        "reference",
        "--freeze_vision_modules",
        "--warmup_ratio",
        "0.5",
        "--max_steps",
        "1",
        "--use_cpu",
        "true",
    ]
    headline = main(["--output_dir", str(tmp_path), "--model_name_or_path", model, *flags, *FAST])
    assert (headline["checkpoint"] / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "evaluation_after.json").read_text())["template"] == "medr1_sft"
    assert json.loads((tmp_path / "config.json").read_text())["training"]["warmup_steps"] == 0.5


def test_with_no_flags_the_starter_policy_is_taught_in_the_form_it_knows(tmp_path):
    """What it is to say is likely from the start but for the labels: far from the nat and more a token of any other text."""
    headline = main(["--output_dir", str(tmp_path), "--max_steps", "1", "--eval_limit", "8", "--use_cpu", "true"])
    assert headline["loss_first"] < 0.15
    assert json.loads((tmp_path / "evaluation_before.json").read_text())["template"] == "medr1_train_think"
    assert json.loads((tmp_path / "config.json").read_text())["training"]["learning_rate"] > 1e-4


def test_what_is_learnt():
    row = {"answer": "C", "solution": "C", "options": {"A": "CT", "B": "MRI", "C": "X-Ray"}}
    assert task("default", starts_small=False).target(row) == "<answer> C </answer>"
    assert task("reference", starts_small=False).target(row) == "None\n\n<answer> C </answer>"
    there = pickle.loads(pickle.dumps(task("default", starts_small=True)))  # as spawned workers have it
    assert there.target(row) == respond("X-Ray", "C").removesuffix("<|im_end|>")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_generations", "4"], "unknown flag --num_generations"),
        (["--per_device_train_batch_size", "2000"], "the training set has 1440 rows; one optimizer step needs 32000 prompts"),
        (["--max_prompt_length", "20"], "row 0: a prompt of"),
        (["--eval_strategy", "epoch"], "--eval_strategy is not supported"),
    ],
)
def test_a_mistake_is_one_line(model, tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        main(
            ["--output_dir", str(tmp_path / "run"), "--model_name_or_path", model, "--use_cpu", "true", "--eval_limit", "0", *flags]
        )
    assert message in str(error.value) and "\n" not in str(error.value)
