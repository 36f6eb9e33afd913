"""What this process computes on, and the memory it has held."""

import sys
from pathlib import Path

import pytest
import torch

from engine.device import describe_device, peak_memory_gb


def test_the_device_is_named(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name() in describe_device()
    else:
        assert describe_device() == "cpu (2 threads)"


def test_peak_memory_is_counted_in_units_of_1e9_bytes():
    before = peak_memory_gb(torch.device("cpu"))
    held = torch.ones(120_000_000)
    assert 0.02 < before < 60
    assert max(before, held.nbytes / 1e9) <= peak_memory_gb(torch.device("cpu")) < 60


@pytest.mark.skipif(sys.platform != "linux", reason="reads the truth from /proc")
def test_peak_memory_is_in_bytes():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_memory_gb(torch.device("cpu")) * 1e9 == pytest.approx(int(status["VmHWM"].split()[0]) << 10, rel=0.05)
