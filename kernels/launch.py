"""How the ops launch Triton kernels, and how they say so to the tools that compile the same launches without a GPU.

An op's body branches once, on `runs_triton`: where Triton is installed CUDA tensors go to it, all others to the eager path. Under
TRITON_INTERPRET=1 every tensor goes to Triton, whose interpreter runs on CPU tensors: the tests check the bodies that way. Float64
is there to check with, and is always computed eagerly: the bodies compute in float32.

A body indexes its tensors as contiguous ones, so every op makes them so; and every launch goes through `launch`.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.library import CustomOpDef, custom_op, wrap_triton
from torch.nn import Parameter

from kernels.language import HAS_TRITON, triton

LARGE_SHARED, SMALL_SHARED = 227 << 10, 99 << 10  # bytes a program may have on an H100; on sm_86, sm_89 and sm_120


class LaunchConfig(NamedTuple):
    """One launch that an op really makes. A kernel module lists its own in `launch_configs()`; bench.static_check compiles them.

    `arguments`: an example for every parameter that is not constexpr, in order; tensors (of any size, also on the meta device)
    stand for pointers of their dtype, aligned as the allocator aligns; tuples hold more of the same. `constants`: constexprs,
    num_warps and num_stages, the same dictionary that the launch passes. `archs`: the compute capabilities where it is made so,
    80 for sm_80 (sm_89 stands for the devices with little shared memory).
    """

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    archs: tuple[int, ...] = (80, 89, 90, 100)


@functools.cache
def _warn_of_eager_cuda() -> None:
    warnings.warn("Triton is not installed: on this GPU the kernels run eagerly and slowly (pip install triton)", stacklevel=3)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor launches Triton."""
    if HAS_TRITON:
        return tensor.dtype != torch.float64 and (tensor.is_cuda or triton.knobs.runtime.interpret)
    if tensor.is_cuda:
        _warn_of_eager_cuda()
    return False


def exports_reference(tensor: torch.Tensor) -> bool:
    """Whether torch.export is tracing a graph of CPU tensors: it goes where our ops are not, so it holds their references' own.

    A graph of CUDA tensors keeps the ops, whose kernels AOTInductor then compiles into its package.
    """
    return torch.compiler.is_exporting() and not tensor.is_cuda


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have; that of an H100 where there is no device to ask (the interpreter, tracing)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return LARGE_SHARED
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks this field
    return properties.shared_memory_per_block_optin


def triton_op(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """`torch.library.triton_op` of a body that changes none of its inputs; without Triton an ordinary op, traced by its body."""
    if HAS_TRITON:
        return torch.library.triton_op(name, mutates_args=())

    def register(body: Callable[..., Any]) -> CustomOpDef:
        op = custom_op(name, body, mutates_args=())
        op.register_fake(body)
        return op

    return register


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Within it the current CUDA device is that of `tensor`: Triton launches on the current one, whatever its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of the first argument, a tensor.

    What torch.compile traces (a `triton_op`, whose tensors then are of a class of torch's own) is launched visibly to it: no tuples
    among the arguments. It switches devices in the code that it writes.
    """
    if type(arguments[0]) not in (torch.Tensor, Parameter):
        wrap_triton(kernel)[grid](*arguments, **constants)
        return
    with on_device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def padded_power(size: int, most: int = 1 << 30) -> int:
    """The smallest power of two that is at least `size`, but not more than `most`, itself a power of two.

    Found by comparisons: of a size that torch.compile traces as a symbol these are short guards, where twiddled bits are huge ones.
    """
    power = 1
    while power < most and power < size:
        power *= 2
    return power
