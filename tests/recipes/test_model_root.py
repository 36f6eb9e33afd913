"""A folder with a model in each of its folders, as Med-R1 is published: naming it lists them, naming one of them opens it."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from engine.errors import InputError
from models.checkpoint import find_folder
from models.prs_med.model import load_prs_med
from models.uni_medvlm.checkpoints.loading import load_pretrained
from tests.hub_server import serve
from tests.tiny_qwen import save_tiny

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "CT MRI X-Ray US Dermo Fundus Micro OCT Anatomy_Identification Disease_Diagnosis Lesion_Grading Modality_Recognition Other_Bio"
)
MODELS = sorted(f"VQA_{part}" for part in PARTS.split())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("Med-R1")
    save_tiny(folder / MODELS[0], "qwen2_vl")
    for name in MODELS[1:]:
        shutil.copytree(folder / MODELS[0], folder / name)
    (folder / "README.md").write_text("13 models")
    return folder


@pytest.mark.parametrize(
    "recipe, flag, shown",
    [
        ("medr1_eval", "--model", "--model"),
        ("medr1_eval", "--model_path", "--model"),
        ("medr1_adversarial_eval", "--model_path", "--model"),
        ("medr1_batch_eval", "--model_path", "--model"),
        ("medvlm_r1_eval", "--model_path", "--model"),
        ("medvlm_r1_demo", "--model", "--model"),
        ("medr1_grpo", "--model_name_or_path", "--model_name_or_path"),
        ("medr1_sft", "--model_name_or_path", "--model_name_or_path"),
        ("medvlm_r1_grpo", "--model_name_or_path", "--model_name_or_path"),
    ],
)
def test_naming_the_root_lists_what_can_be_named(root, tmp_path, monkeypatch, recipe, flag, shown):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        import_module(f"recipes.{recipe}").main([flag, str(root)])
    expected = f"{shown}: {root}: no checkpoint itself, but holds 13 (expected one of these folders in it to be named: "
    assert str(error.value) == f"{expected}{', '.join(MODELS)})"


def test_naming_one_of_them_opens_it(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = import_module("recipes.medr1_eval").main
    for number, path in enumerate((root / "VQA_CT", os.path.relpath(root / "VQA_OCT"))):
        assert (
            main(["--model_path", str(path), "--limit", "2", "--max_new_tokens", "3", "--output_dir", f"{number}"])["num_samples"]
            == 2
        )


def test_many_folders_are_not_all_shown(tmp_path):
    for number in range(30):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "adapter_config.json").write_text("{}")
        for settings in ("prs_med.json", "unimed.json"):
            (tmp_path / f"checkpoint-{number}" / settings).write_text("{}")
    (tmp_path / "config.json").write_text("{}")  # a run's settings
    for load in (find_folder, load_prs_med, load_pretrained):
        with pytest.raises(OSError, match=r"holds 30 \(.*checkpoint-0, checkpoint-1, .*checkpoint-19, \.\.\.\)$"):
            load(tmp_path)


def test_a_root_on_the_hub_is_not_fetched_whole(root, tmp_path):
    """All its models would come, and none of them can be opened by that name."""
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with serve(files, {name for name in files if name.endswith(".safetensors")}) as hub:
        code = "import sys; from models.checkpoint import find_folder; find_folder('O/N')"
        env = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        env |= {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
        ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        asked = [path for _, path, _ in hub.log if "/resolve/" in path]
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("OSError: O/N: no checkpoint itself, but holds 13 (") and all(name in last for name in MODELS)
    assert last.endswith("; fetch one: python -m recipes.download --model O/N --include VQA_Anatomy_Identification/")
    assert not asked and not hub.storage.log
