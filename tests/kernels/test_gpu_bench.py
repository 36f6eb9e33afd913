"""The GPU bench without a GPU: it says so, and its cases run small on the CPU."""

import json
import sys

import pytest
import torch

from bench import gpu, gpu_grpo, mask_decoder
from bench.measure import against_eager, relative_errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "error: no CUDA device here; `--device cpu --tiny` tries the bench itself\n"


MASK_DECODER = ["token to image", "image to token (", "upscale (", "decoder, B=4"]


@pytest.mark.parametrize("only", ["advantages", "frozen head", "head grpo", *MASK_DECODER])
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


def test_without_liger_its_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ModuleNotFoundError, match=r"liger-kernel is not installed \(pip install liger-kernel\)"):
        gpu_grpo._liger_loss(*[None] * 5, gpu_grpo.LOSS)


def test_one_wrong_element_or_a_nan_in_any_gradient_is_more_than_is_allowed():
    truth = [torch.randn(400, 400, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3)]
    eager = [exact.bfloat16().double() for exact in truth]
    assert against_eager(eager, eager, truth)[0] < 1
    for index in range(len(truth)):
        for wrong in (1.0, torch.nan):
            ours = [value.clone() for value in eager]
            ours[index][-1, -1] += wrong
            error, allowed = against_eager(ours, eager, truth)
            assert not error <= allowed
    assert relative_errors(ours, truth).max().isnan()


def test_the_mask_decoder_bench_says_what_it_said(monkeypatch):
    monkeypatch.setattr(mask_decoder, "cpu_seconds", lambda providers, repetitions: dict.fromkeys(providers, 0.5))
    result = mask_decoder.main(["--prompts", "1", "--no_compile"])
    keys = ["device", "torch", "triton", "dtype", "max_abs_error", "seconds_1_transformers", "seconds_1_ours", "speedup_1"]
    assert list(result) == keys and result["max_abs_error"] < 1e-4
