"""Fixtures of the kernel tests."""

import pytest
import torch


@pytest.fixture
def triton():
    """The package; a test that asks for it, or runs Triton bodies in the interpreter, is skipped where there is none."""
    return pytest.importorskip("triton", reason="Triton is not installed here")


@pytest.fixture(autouse=True)
def _bodies_need_triton(request):
    if request.node.get_closest_marker("triton"):
        request.getfixturevalue("triton")


@pytest.fixture
def hopper(triton):
    """What is traced or compiled is for sm_90, though there is no driver to say so."""
    from triton.backends.compiler import GPUTarget

    class NoDriver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(NoDriver())


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin return NaN, so an output that is not written is seen."""
    torch.use_deterministic_algorithms(True)  # with it, torch fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)
