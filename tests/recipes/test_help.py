"""--help reads well and answers before anything slow is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TRAINER = ["download", "prs_med_infer", "sam_predict", "serve_viewer", "unimed_grounding_subset"]
WITHOUT_TRAINER += [f"{system}_prepare" for system in ("medr1", "medvlm_r1", "skin", "prs_med")]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """{recipe: what its --help prints}; the process that prints them must not import torch."""
    code = f"""
import importlib, sys
for name in {WITHOUT_TRAINER}:
    print("recipe", name)
    try:
        importlib.import_module(f"recipes.{{name}}").main(["--help"])
    except SystemExit as end:
        assert end.code == 0
slow = {{"torch", "transformers", "datasets", "scipy", "pydicom", "matplotlib"}} & set(sys.modules)
assert not slow, slow
"""
    env = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = dict(text.split("\n", 1) for text in done.stdout.removeprefix("recipe ").split("\nrecipe "))
    assert list(printed) == WITHOUT_TRAINER
    return printed


@pytest.mark.parametrize("recipe", WITHOUT_TRAINER)
def test_help_has_the_command_and_a_line_for_every_flag(helps, recipe):
    text = helps[recipe]
    assert text.startswith(f"usage: python -m recipes.{recipe} ") and f"    python -m recipes.{recipe}" in text
    options = text[text.index("\noptions:") :]
    flags = [line for line in options.splitlines() if line.startswith("  --")]
    assert len(flags) >= 4 and max(map(len, text.splitlines())) <= 132
    assert "(default: None)" not in text and "(default: [])" not in text and "(default: )" not in text
