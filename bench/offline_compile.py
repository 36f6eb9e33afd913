"""Compile Triton kernels for NVIDIA architectures without a GPU or a driver, and read what they will use.

The specialisation is the launcher's: tensors are 16-byte aligned pointers, integers that 16 divides are known to be, an integer 1
and None are constants. Without those attributes the same kernels show narrow loads and false spills. A process with
TRITON_INTERPRET=1 cannot compile.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launch import LaunchConfig

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
# Per multiprocessor: registers, threads, shared bytes (and those that the system takes of each block).
REGISTERS, BLOCKS, RESERVED = 65536, 32, 1024
WARPS = {80: 64, 89: 48, 90: 64, 100: 64}
SHARED = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10}


@dataclass
class Resources:
    """What one compiled kernel uses: a thread's registers, bytes spilled, shared bytes a block, instruction counts and widths."""

    name: str
    arch: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int
    wgmma: int
    mma: int
    tcgen05: int
    async_copies: int

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Blocks that fit a multiprocessor by registers (allotted to a warp by 256), warps and shared memory."""
        registers = -(-self.registers * 32 // 256) * 256 * self.num_warps
        by_shared = SHARED[self.arch] // (self.shared_bytes + RESERVED)
        return min(REGISTERS // registers, WARPS[self.arch] // self.num_warps, BLOCKS, by_shared)

    @property
    def occupancy(self) -> float:
        """Resident warps as a share of those a multiprocessor can hold."""
        return self.blocks_per_multiprocessor * self.num_warps / WARPS[self.arch]


def specialise(config: LaunchConfig) -> tuple[dict, dict, dict]:
    """(signature, constexprs, attributes) of a launch as Triton's launcher would make them."""
    names = config.kernel.arg_names
    constants = {name: value for name, value in config.constants.items() if name in names}
    signature, attributes, arguments = {}, {}, iter(config.arguments)
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = next(arguments)
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif value is None or value is True or value is False or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and signature[name] != "constexpr" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, {(names.index(name),): value for name, value in constants.items()}, attributes


def _widest(ptx: str, instruction: str) -> int:
    """Bytes that a thread moves by the widest global `instruction` ("ld" or "st")."""
    widths = [0]
    for vector, bits in re.findall(rf"\b{instruction}\.[\w.:]*?global[\w.:]*?(?:\.(v[248]))?\.[bfsu](\d+)\b", ptx):
        widths.append(int(vector[1:] or 1 if vector else 1) * int(bits) // 8)
    if instruction == "ld":
        widths += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.[\w.:]+ \[[^]]+\], \[[^]]+\], (\w+)", ptx)]
    return max(widths)


def compile_for(config: LaunchConfig, arch: int) -> Resources:
    """Compile one launch for sm_`arch` and read its resources; ptxas is the only one to know about spills."""
    signature, constants, attributes = specialise(config)
    options = {key: config.constants[key] for key in LAUNCH_OPTIONS if key in config.constants}
    source = ASTSource(fn=config.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        tool = TOOLS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [tool, "-v", target, path, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Resources(
        name=config.name,
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        spill_bytes=sum(int(size) for size in re.findall(r"(\d+) bytes spill", report)),
        shared_bytes=compiled.metadata.shared,
        load_bytes=_widest(ptx, "ld"),
        store_bytes=_widest(ptx, "st"),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=len(re.findall(r"tcgen05\.mma", ptx)),
        async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
    )
