"""The bench of the mixture of experts, small: ours equals the others' layers, and its JSON says what is promised."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.moe import CASES, main, products
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
SMALL = ["--tiny", "--tokens", "128", "--repetitions", "1"]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def assert_promised(summary, cases):
    assert [row["case"].split(" S=")[0] for row in summary["cases"]] == cases
    for row in summary["cases"]:
        assert row["max_abs_error"] < 1e-5 and row["max_relative_error"] < 1e-5
        assert row["speedup"] > 0 and row["speedup_bound"] > 0 and row["memory_ratio"] >= 0 and row["first_memory_ratio"] >= 0
        assert summary["speedup"] <= row["speedup"] and summary["memory_ratio"] >= row["memory_ratio"]
        assert row["cpu_seconds"].keys() == row["products_seconds"].keys() == row["rss_mb"].keys() > {"ours"}


def test_ours_equals_the_sparse_block_and_the_line_is_complete(capsys):
    assert main([*SMALL, "--only", "E=64"]) == 0
    assert_promised(json.loads(capsys.readouterr().out.splitlines()[-1]), ["E=64, top-8"])


@pytest.mark.skipif(HAS_DEEPSPEED, reason="DeepSpeed is installed here")
def test_without_deepspeed_a_line_says_what_is_left_out(capsys):
    assert main([*SMALL, "--only", "E=2"]) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first == "DeepSpeed is not installed (pip install -e '.[scale]'): its cases are left out"
    assert last.startswith("error: no case is left of E=2, ")


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed here")
def test_ours_equals_deepspeeds_layer_whole_and_with_lora():
    command = [sys.executable, "-m", "bench.moe", *SMALL, "--only", "E=2"]  # its process group ends with the process
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_promised(json.loads(done.stdout.splitlines()[-1]), ["E=2", "E=2, LoRA"])


@pytest.mark.parametrize(("name", "each"), [("E=4", 18), ("E=4, LoRA", 12)])
def test_the_products_alone_are_all_of_a_step(name, each):
    case = CASES[name]._replace(hidden=24, inner=40)
    run = products(case, 10, lambda x, w: torch.mm(x, w.T))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == each * 4 * 10 * 24 * 40
