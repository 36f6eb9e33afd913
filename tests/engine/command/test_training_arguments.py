"""TrainingArguments without peft, and transformers that knows peft's models all the same."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def python(code: str) -> str:
    """What `code` prints in a process of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_knows_a_model_of_peft_that_was_imported_later():
    code = """
import sys
from engine.command.training_arguments import TrainingArguments
from transformers import trainer_utils
assert "peft" not in sys.modules, "peft was imported"
import torch
model = torch.nn.Sequential(torch.nn.Linear(2, 2))
before = trainer_utils._is_peft_model(model), "peft" in sys.modules
from peft import LoraConfig, get_peft_model
adapted = get_peft_model(model, LoraConfig(target_modules=["0"]))
from transformers import Trainer, TrainingArguments as theirs
assert theirs is TrainingArguments
print(*before, trainer_utils._is_peft_model(model), trainer_utils._is_peft_model(adapted))
"""
    assert python(code) == "False False False True"


def test_where_peft_is_imported_already_nothing_is_put_in_its_place():
    code = """
import peft
from engine.command.training_arguments import TrainingArguments
from transformers import trainer_utils
print(trainer_utils.PeftModel is peft.PeftModel)
"""
    assert python(code) == "True"


def test_a_recipe_without_a_trainer_reads_its_flags_without_torch():
    code = """
import sys
import engine.command.arguments, engine.command.main, engine.command.run_folder, engine.command.settings, engine.data.splits
print({"torch", "transformers", "datasets", "scipy", "pydicom"} & set(sys.modules))
"""
    assert python(code) == "set()"
