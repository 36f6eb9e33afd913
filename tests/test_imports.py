"""Our package `kernels` and the libraries that look for Hugging Face's live side by side, or say why they cannot."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, path: str = "") -> subprocess.CompletedProcess:
    """Run `code` from the repository root, as a user does; `path` comes after it on sys.path."""
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_transformers_trl_and_peft_import_from_the_repository_root():
    code = """
import kernels, models, engine
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration, Trainer
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import is_kernels_available
from trl import GRPOTrainer, SFTTrainer, TrlParser
from peft import LoraConfig, get_peft_model
assert not hasattr(kernels, "__version__")
assert not is_kernels_available(), "transformers takes our package for Hugging Face's"
print(kernels.__file__)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(ROOT / "kernels" / "__init__.py")


def test_the_hugging_face_kernels_distribution_is_refused_by_name(tmp_path):
    folder = tmp_path / "kernels-0.17.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    done = python("import kernels", path=str(tmp_path))
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: ") and "'kernels' 0.17.2" in error
    assert "shadows" in error and "pip uninstall kernels" in error
