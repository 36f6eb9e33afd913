"""The bench of compiled layers compares, counts and times them, on small rows and without a compiler."""

import json

import pytest

from bench import compile as bench


def test_a_small_step_is_compiled_compared_and_timed(capsys):
    result = bench.main(["--backend", "aot_eager", "--repetitions", "1", "--tokens", "6", "--side", "140"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said.keys() == result.keys() and said["backend"] == "aot_eager"
    assert result["graph_breaks"] == 0 and result["compilations"] in (1, 2) and result["max_rel_error"] <= 1e-5
    assert result["all_compilations"] >= 4  # language model and tower, with gradients and without
    assert result["step_ratio"] == pytest.approx(result["compiled_s"] / result["eager_s"]) and result["compile_seconds"] > 0
