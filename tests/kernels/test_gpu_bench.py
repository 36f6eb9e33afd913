"""The GPU bench without a GPU: it says so, and its cases run small on the CPU."""

import sys

import pytest
import torch

from bench import mask_decoder
from bench.gpu import __main__ as gpu
from bench.gpu import grpo, moe, prefix_attention, qwen, sample
from bench.gpu import mask_decoder as gpu_mask_decoder
from bench.gpu.case_worker import FIRST, cases, perform
from bench.measure import against_eager, relative_errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "error: no CUDA device here; `--device cpu --tiny` tries the bench itself\n"


CPU = torch.device("cpu")
JOB = {"device": "cpu", "tiny": True, "roof": [1e9, 1e9]}
MASK_DECODER = ["token to image", "image to token (", "upscale (", "decoder, B=4", "decoder without", "predictor"]
CHECKS = [
    (grpo, "advantages"),
    *[(gpu_mask_decoder, name) for name in MASK_DECODER],
    (moe, ""),
    (prefix_attention, ""),
    (qwen, "decode"),
    (sample, ""),
]


@pytest.mark.parametrize(("module", "only"), CHECKS)
def test_checks_pass_small_on_the_cpu(module, only):
    names = [check.name for check in module.checks(CPU, True) if only in check.name]
    records = [record for record in perform(JOB | {"work": "checks", "names": names}, [module]) if record["kind"] == "check"]
    assert [record["name"] for record in records] == names and all(record["passed"] for record in records)


@pytest.mark.parametrize("module", [grpo, gpu_mask_decoder, moe, prefix_attention, qwen, sample])
def test_every_case_can_be_built_and_has_a_name_of_its_own(module):
    built = list(cases(module, CPU, True))
    assert len({case.name for case in built}) == len(built)
    for case in built:
        timing = case.build()
        assert next(iter(timing.providers)) == "ours" and case.peers == any(name not in FIRST for name in timing.providers)


TIMED = [
    (grpo, "frozen head"),
    (grpo, "loss fwd ["),
    (qwen, "decode step"),
    (prefix_attention, "prefix attention fwd+bwd, B=1"),
    (prefix_attention, "prefix decode"),
    (sample, "sample [64, 151936], cut off"),
    (gpu_mask_decoder, "predictor"),
    (moe, "dispatch + combine [64, 64], E=8"),
]


@pytest.mark.parametrize(("module", "only"), TIMED)
def test_cases_are_timed_small_on_the_cpu(module, only):
    [name] = [case.name for case in cases(module, CPU, True) if case.name.startswith(only)]
    records = [*perform(JOB | {"work": "timing", "names": [name], "providers": "first"}, [module])]
    rows = {record["row"]["provider"]: record["row"] for record in records if record["kind"] == "row"}
    assert set(rows) == {"ours", "eager"} and all(row["ms"] > 0 and row["case"] == name for row in rows.values())


@pytest.mark.parametrize("module", [grpo, gpu_mask_decoder, moe, prefix_attention, sample])
def test_the_sanitizer_has_checks_of_every_op(module):
    for beginning in module.SANITIZED:
        assert any(check.name.startswith(beginning) for check in module.checks(CPU, True))


def test_what_fails_is_reported_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr("bench.gpu.grpo.group_advantages", lambda *_, **__: 1 / 0)
    names = ["advantages by group", "advantages by none"]
    records = list(perform(JOB | {"work": "checks", "names": names}, [grpo]))
    assert [record["name"] for record in records if record["kind"] == "check"] == names
    assert records[1]["outcome"] == "ZeroDivisionError: division by zero"


def test_without_liger_its_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ModuleNotFoundError, match=r"liger-kernel is not installed \(pip install liger-kernel\)"):
        grpo._liger_loss(*[None] * 5, grpo.LOSS)


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
