"""The static check finds every launch, passes what is launched, and fails what spills or loads narrowly."""

import json

import pytest

from bench import static_check
from bench.offline_compile import compile_for
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
