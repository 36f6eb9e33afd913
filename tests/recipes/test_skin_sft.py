"""Stage 1 of skin diagnosis: a run on HAM10000's own files by the published configuration, and mistakes in one line."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from engine.data.prepare.ham10000 import SkinPreparation, prepare_skin
from engine.errors import InputError
from engine.tasks.skin.evaluation import confusion_png
from recipes.skin_sft import main
from tests.tiny_qwen import save_tiny

HAM = Path("../shared/data/mini/ham10000_mini").resolve()
FAST = "--use_cpu true --max_completion_length 4 --eval_limit 3 --max_pixels 12544 --logging_steps 1".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """34 real photographs of HAM10000's collection, prepared."""
    if not HAM.is_dir():
        pytest.skip(f"{HAM} is not here")
    folder = tmp_path_factory.mktemp("skin") / "data"
    prepare_skin(SkinPreparation(metadata=str(HAM / "HAM10000_metadata.csv"), output=str(folder)))
    return folder


def test_the_published_configuration_trains_an_adapter_on_real_photographs(model, prepared, tmp_path):
    settings = {
        "model_name": model,
        "train_image_dir": str(prepared / "images"),
        "spatial_dataset_file": str(prepared / "ham10000_with_spatial_data.json"),
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "max_length": 512,
        "lora_r": 4,
        "lora_alpha": 8,
        "include_spatial_descriptions": True,
        "spatial_description_ratio": 0.5,
        "warmup_steps": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    evaluated = ["--eval_dataset_name", str(prepared)]
    headline = main(["--config", str(tmp_path / "config.json"), "--max_steps", "2", *FAST, *evaluated])
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), headline["checkpoint"])
    assert adapted.peft_config["default"].r == 4
    names = {"diagnosis_accuracy", "region_accuracy", "mean_iou", "balanced_accuracy", "iou_over_50"}
    assert {f"{name}_{when}" for name in names for when in ("before", "after")} <= set(headline)
    before = json.loads((tmp_path / "out" / "evaluation_before.json").read_text())
    assert {result["question_type"] for result in before["results"]} == {"box"}
    assert sum(map(sum, before["confusion"]["rows"])) == len(before["results"]) == 3
    assert (tmp_path / "out" / "confusion_after.png").read_bytes() == confusion_png(
        json.loads((tmp_path / "out" / "evaluation_after.json").read_text())["confusion"]["rows"]
    )


def test_a_run_stopped_and_resumed_is_the_same_run(model, prepared, tmp_path):
    flags = ["--model_name_or_path", model, "--dataset_name", str(prepared), "--warmup_steps", "0", *FAST, "--eval_limit", "0"]
    flags += ["--max_steps", "2", "--save_steps", "1", "--output_dir", str(tmp_path)]
    whole = AutoModelForImageTextToText.from_pretrained(main(flags)["checkpoint"]).state_dict()
    again = main([*flags, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")])
    resumed = AutoModelForImageTextToText.from_pretrained(again["checkpoint"]).state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dataset_name", "nowhere"], "nowhere: no such file or folder"),
        (["--spatial_description_ratio", "1.5"], "--spatial_description_ratio 1.5: expected a number, at least 0 and at most 1"),
        (["--question", "size"], "invalid choice: 'size'"),
        (["--limit", "0"], "--limit 0: expected a number, at least 1"),
    ],
)
def test_mistakes_are_one_line(flags, words):
    with pytest.raises(InputError) as refused:
        main(flags)
    assert words in str(refused.value) and "\n" not in str(refused.value)
