"""The static check finds every launch, passes what is launched, and fails what spills or loads narrowly."""

import importlib.util
import json
from pathlib import Path

import pytest

from bench import static_check
from bench.offline_compile import compile_for
from kernels import linear_logprob
from kernels.linear_grpo import launch_configs

pytestmark = pytest.mark.usefixtures("triton")


def test_the_row_kernel_passes_on_hopper(capsys):
    assert static_check.main(["--arch", "90", "--only", "grpo row"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["kernels"] == 1 and summary["spills"] == 0 and summary["failures"] == []


def test_every_kernel_module_is_found():
    names = {config.name for config in static_check.launches()}
    assert {"advantages, group", "grpo loss, token level, KL", "grpo row, on-policy", "logit stats, tile"} <= names
    assert len(names) == len(list(static_check.launches()))


def test_a_spilling_configuration_fails_the_gate():
    config = next(launch_configs())
    cramped = compile_for(config._replace(constants=config.constants | {"maxnreg": 32}), 90)
    assert cramped.spill_bytes > 0
    assert static_check.failures([cramped]) == [f"{config.name} on sm_90 spills {cramped.spill_bytes} bytes"]


def test_narrow_loads_of_the_row_kernel_fail_the_gate():
    config = next(launch_configs())
    odd = (config.arguments[0], 151937, *config.arguments[2:])  # a vocabulary that 16 does not divide
    narrow = compile_for(config._replace(arguments=odd), 90)
    assert narrow.load_bytes < 16
    assert "not 16" in static_check.failures([narrow])[-1]


def test_a_program_too_large_for_the_device_fails_the_gate():
    config = next(launch_configs())
    assert 89 not in config.archs
    assert "does not fit sm_89: 131072 bytes shared" in static_check.failures([compile_for(config, 89)])[-1]


def gradient_configs(ending):
    """Launches of the kernel that writes over a row of logits."""
    configs = [config for config in linear_logprob.launch_configs() if config.name.startswith("logit gradient")]
    return [config for config in configs if ending in config.name]


def test_the_row_kernel_spills_nothing_on_blackwell_where_one_program_fills_a_multiprocessor():
    """Left to itself ptxas keeps to 64 registers there, as if a second one fitted."""
    config = next(launch_configs())
    launched = compile_for(config, 100)
    assert static_check.failures([launched]) == [] and launched.blocks_per_multiprocessor == 1
    constants = {name: value for name, value in config.constants.items() if name != "maxnreg"}
    left_alone = compile_for(config._replace(constants=constants), 100)
    assert left_alone.spill_bytes and static_check.failures([left_alone]) == [
        f"{config.name} on sm_100 spills {left_alone.spill_bytes} bytes"
    ]


@pytest.mark.parametrize("odd", [False, True])
def test_every_warp_reads_the_chosen_logit_before_any_writes_over_it(odd):
    for config in gradient_configs("odd vocabulary" if odd else ""):
        assert static_check.failures([compile_for(config, 90)]) == []


def test_a_sweep_without_its_barrier_fails_the_gate(tmp_path):
    """The kernels as they are, line by line, but for the barrier: an odd vocabulary then has none."""
    text = Path(linear_logprob.__file__).read_text(encoding="utf-8").split("class SoftmaxStats")[0]
    racing = text.replace("    tl.debug_barrier()\n    columns", "    pass\n    columns")
    assert racing != text
    path = tmp_path / "linear_logprob.py"
    path.write_text(racing, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("racing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    [config] = [config for config in gradient_configs("odd") if "fp32" not in config.name]
    compiled = compile_for(config._replace(kernel=module._gradient_kernel), 90)
    assert compiled.chosen_read_first is False
    assert "may write over its chosen logit" in static_check.failures([compiled])[-1]


def test_two_products_in_one_accumulator_by_tcgen05_fail_the_gate():
    [config] = [config for config in static_check.launches() if config.name == "token to image, backward"]
    launched = compile_for(config, 100)
    assert launched.mma and not launched.tcgen05 and static_check.failures([launched]) == []
    larger = compile_for(config._replace(constants=config.constants | {"TOKENS": 64}), 100)
    assert larger.tcgen05 and any("two products" in line for line in static_check.failures([larger]))
