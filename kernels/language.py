"""Triton, as the kernel modules import it: `from kernels.language import tl, triton`.

There is no Triton for macOS or Windows. Where it is absent every op computes eagerly, and `triton` and `tl` are stand-ins with the
only two things that run when a module is imported: the decorator of a kernel, whose body is then never read, and its constants.
A Triton that is installed but broken is an error, not absent.
"""

from types import SimpleNamespace
from typing import Any


class _Constant:
    """What `tl.constexpr` is to Python: an annotation, and a box around a value."""

    def __init__(self, value: Any) -> None:
        self.value = value


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton, tl = SimpleNamespace(jit=lambda body: body), SimpleNamespace(constexpr=_Constant)
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "tl", "triton"]
