"""How the ops launch Triton kernels, and how they say so to the tools that compile the same launches without a GPU.

An op's body branches once, on `runs_triton`: CUDA tensors go to Triton, others to the eager path. Under TRITON_INTERPRET=1 every
tensor goes to Triton, whose interpreter runs on CPU tensors: the tests check the bodies that way.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch.library import wrap_triton

LARGE_SHARED, SMALL_SHARED = 227 << 10, 99 << 10  # bytes a program may have on an H100; on sm_86, sm_89 and sm_120


class LaunchConfig(NamedTuple):
    """One launch that an op really makes. A kernel module lists its own in `launch_configs()`; bench.static_check compiles them.

    `arguments`: an example for every parameter that is not constexpr, in order; tensors (of any size, also on the meta device)
    stand for pointers of their dtype, aligned as the allocator aligns. `constants`: constexprs, num_warps and num_stages, the
    same dictionary that the launch passes. `archs`: the compute capabilities where it is made so, 80 for sm_80 (sm_89
    stands for the devices with little shared memory).
    """

    name: str
    kernel: Any
    arguments: tuple
    constants: dict[str, Any]
    archs: tuple[int, ...] = (80, 89, 90, 100)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor launches Triton."""
    return tensor.is_cuda or triton.knobs.runtime.interpret


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have; that of an H100 where there is no device to ask (the interpreter, tracing)."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if there else LARGE_SHARED


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch within a `triton_op`, visibly to torch.compile."""
    wrap_triton(kernel)[grid](*arguments, **constants)
