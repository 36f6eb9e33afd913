"""MedVLM-R1's training: its settings, two steps on starter data, resumed to the bit, and on a folder its prepare recipe makes."""

import json
import shutil

import pytest

from engine.errors import InputError
from models.loading import STARTER_POLICY
from recipes.medvlm_r1_grpo import main
from tests.tiny_qwen import noise_image, save_tiny

FAST = ["--max_steps", "2", "--save_steps", "1", "--use_cpu", "true"]
# The starter policy, under its path: its answers earn rewards, and naming it leaves the published settings as they are.
TRAINED = ["--model_name_or_path", str(STARTER_POLICY), "--learning_rate", "1e-4", "--compat", "reference", *FAST]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run folder, headline) of a short run on the starter data, scored as published."""
    folder = tmp_path_factory.mktemp("run")
    return folder, main(["--output_dir", str(folder), "--eval_limit", "12", *TRAINED])


def test_a_run_has_the_published_settings_and_scores_radiology_alone(finished):
    folder, headline = finished
    training = json.loads((folder / "config.json").read_text())["training"]
    published = {"num_generations": 4, "max_prompt_length": 512, "max_completion_length": 512, "num_train_epochs": 2, "beta": 0.04}
    published |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "temperature": 1.0, "seed": 42}
    assert {name: training[name] for name in published} == published
    assert set(headline["by_modality_before"]) == set(headline["by_modality_after"]) == {"CT", "MRI", "X-Ray"}
    evaluation = json.loads((folder / "evaluation_after.json").read_text())
    assert (evaluation["template"], evaluation["compat"]) == ("medvlm_train_complex", "reference")
    assert headline["accuracy_after"] == evaluation["scores"]["overall"]["accuracy"]
    assert headline["reward_first"] > 0.5  # the starter policy answers this prompt in form
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and {"rewards/accuracy/mean", "rewards/format/mean", "kl"} <= set(rows[0])


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-1", tmp_path / "checkpoint-1")
    headline = main(["--output_dir", str(tmp_path), "--eval_limit", "0", "--resume_from_checkpoint", "true", *TRAINED])
    weights = [folder / "checkpoint-2" / "model.safetensors" for folder in (finished[0], tmp_path)]
    assert headline["checkpoint"] == tmp_path / "checkpoint-2" and weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].read_bytes() != (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()


def test_other_data_keep_all_their_modalities_and_a_longer_prompt_than_published_is_a_bad_row(tmp_path):
    model = save_tiny(tmp_path / "model", "qwen2_vl")
    noise_image(0).save(tmp_path / "a.png")
    problem = "What is apparent in this image?\nA) Hemorrhage\nB) Abscess formation"
    row = {"image": ["a.png"], "problem": problem, "solution": "B", "options": ["Hemorrhage", "Abscess formation"], "subset": "MRI"}
    (tmp_path / "train.json").write_text(json.dumps([row] * 4))
    (tmp_path / "test.json").write_text(json.dumps([row, {**row, "subset": "Dermoscopy"}]))
    common = ["--model_name_or_path", model, "--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    common += ["--max_completion_length", "8"]
    assert set(main([*common, *FAST])["by_modality_after"]) == {"MRI", "Dermoscopy"}
    (tmp_path / "train.json").write_text(json.dumps([row, {**row, "problem": f"{'Look. ' * 400}{problem}"}]))
    with pytest.raises(InputError, match=r"train.json: row 1: a prompt of \d+ tokens \(expected at most --max_prompt_length 512;"):
        main([*common, *FAST, "--output_dir", str(tmp_path / "another")])
