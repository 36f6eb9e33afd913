"""The life of an adapter: fine-tuned, evaluated, attacked, trained further by GRPO, merged; what is merged answers the same."""

import json

import pytest

from engine.errors import InputError
from recipes import medr1_adversarial_eval, medr1_eval, medr1_grpo, medr1_sft, merge_adapter
from tests.tiny_qwen import save_tiny

FEW = "--max_completion_length 6 --eval_limit 0 --max_steps 1 --save_steps 1 --use_cpu true".split()


def texts(run):
    return [result["model_output"] for result in json.loads((run / "evaluation.json").read_text())["results"]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(the base, the checkpoint of one large step of fine-tuning)."""
    folder = tmp_path_factory.mktemp("life")
    base = save_tiny(folder / "base")
    flags = ["--use_peft", "--learning_rate", "0.1", "--warmup_steps", "0", "--lora_target_modules", "all-linear"]
    sizes = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    said = medr1_sft.main(["--model_name_or_path", base, "--output_dir", str(folder / "sft"), *flags, *sizes, *FEW])
    return base, said["checkpoint"]


def evaluated(model, folder):
    flags = ["--template", "train_think", "--limit", "6", "--max_new_tokens", "8"]
    medr1_eval.main(["--model", str(model), "--output_dir", str(folder), *flags])
    return texts(folder)


def test_what_is_merged_answers_as_base_and_adapter_do(adapter, tmp_path):
    base, checkpoint = adapter
    said = merge_adapter.main(["--model", str(checkpoint), "--output_dir", str(tmp_path / "merged")])
    assert said["base"] == base and said["output"] == str(tmp_path / "merged")
    answers = evaluated(checkpoint, tmp_path / "adapter")
    assert answers == evaluated(tmp_path / "merged", tmp_path / "of_merged") != evaluated(base, tmp_path / "of_base")
    with pytest.raises(InputError, match="merged: exists already"):
        merge_adapter.main(["--model", str(checkpoint), "--output_dir", str(tmp_path / "merged")])


def test_an_adapter_is_attacked(adapter, tmp_path):
    flags = ["--limit", "2", "--max_new_tokens", "4", "--pgd_iters", "1", "--compat", "reference"]
    said = medr1_adversarial_eval.main(["--model", str(adapter[1]), "--output_dir", str(tmp_path), *flags])
    assert said["num_samples"] == 2


@pytest.mark.parametrize("peft", [True, False])
def test_a_fine_tuned_adapter_goes_on_in_grpo(adapter, tmp_path, peft):
    """With --use_peft the adapter itself; without, all weights of base and adapter together. The KL term starts at zero."""
    flags = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--num_generations", "2", *FEW]
    flags += ["--use_peft"] if peft else []
    said = medr1_grpo.main(["--model_name_or_path", str(adapter[1]), "--output_dir", str(tmp_path), *flags])
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert abs(row["kl"]) < 1e-6
    assert (said["checkpoint"] / "adapter_config.json").is_file() == peft
    if peft:
        config = json.loads((said["checkpoint"] / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == adapter[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--load_in_4bit"], "--load_in_4bit needs --use_peft"),
        (["--use_peft", "--lora_target_modules", "nope"], "nope: no layer is called so; there are all-linear, down_proj"),
        (["--use_peft", "--lora_target_modules", "q_proj", "lm_head"], "lm_head is the head"),
        (["--base_model_name_or_path", "x"], "a whole model; only an adapter has a base"),
    ],
)
def test_flags_that_cannot_be_are_refused(adapter, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        medr1_sft.main(["--model_name_or_path", adapter[0], "--output_dir", str(tmp_path), *flags, *FEW])
