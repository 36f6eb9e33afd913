"""Fixtures of the kernel tests."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin return NaN, so an output that is not written is seen."""
    torch.use_deterministic_algorithms(True)  # with it, torch fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)
