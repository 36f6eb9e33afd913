"""The GPU bench without a GPU: it says so, and its cases run small on the CPU."""

import json

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "error: no CUDA device here; `--device cpu --tiny` tries the bench itself\n"


@pytest.mark.parametrize("only", ["advantages", "frozen head", "head grpo"])
def test_cases_run_small_on_the_cpu(only, capsys, tmp_path):
    assert gpu.main(["--device", "cpu", "--tiny", "--only", only, "--output", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["failed_checks"] == summary["stopped"] == summary["left_out"] == []
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_reported_and_the_rest_goes_on(monkeypatch, capsys):
    monkeypatch.setattr("bench.gpu_grpo.group_advantages", lambda *_, **__: 1 / 0)
    assert gpu.main(["--device", "cpu", "--tiny", "--only", "advantages"]) == 1
    shown = capsys.readouterr()
    summary = json.loads(shown.out.splitlines()[-1])
    assert summary["failed_checks"] == ["advantages by group", "advantages by batch", "advantages by none"]
    assert summary["stopped"] == ["advantages [4096], groups of 8"]
    assert "FAILED advantages by group" in shown.err and "ZeroDivisionError" in shown.err
