"""What this process computes on, and the memory it has held."""

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
