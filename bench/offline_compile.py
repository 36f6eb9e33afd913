"""Compile Triton kernels for NVIDIA architectures without a GPU or a driver, and read what they will use.

The specialisation is the launcher's: tensors are 16-byte aligned pointers, integers that 16 divides are known to be, an integer 1
and None are constants. Without those attributes the same kernels show narrow loads and false spills. A process with
TRITON_INTERPRET=1 cannot compile; one without Triton can import this module and no more.
"""

import linecache
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kernels
from kernels.language import triton
from kernels.launch import LaunchConfig

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
    """What one compiled kernel uses: a thread's registers, bytes spilled, shared bytes a block, instruction counts and widths.

    `chosen_read_first`: every warp waits for the others between the load of the chosen logit and the first store over its row; None
    where a kernel does not do both.
    """

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
    chosen_read_first: bool | None

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


class Specialisation(NamedTuple):
    """What a launch fixes at compile time: type names by parameter; constants and attributes by path, (i,) or (i, j) in a tuple."""

    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]


def _type_of(value: Any) -> Any:
    """The type name of one argument; of a tuple, a tuple of the same kind."""
    if isinstance(value, tuple):
        types = map(_type_of, value)
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def specialise(config: LaunchConfig) -> Specialisation:
    """The specialisation of a launch as Triton's launcher would make it."""
    made, arguments = Specialisation({}, {}, {}), iter(config.arguments)
    for index, name in enumerate(config.kernel.arg_names):
        if name in config.constants:
            made.signature[name], made.constants[(index,)] = "constexpr", config.constants[name]
            continue
        value = next(arguments)
        made.signature[name] = _type_of(value)
        members = {(index, place): member for place, member in enumerate(value)} if isinstance(value, tuple) else {(index,): value}
        for path, member in members.items():
            if _type_of(member) == "constexpr":
                made.constants[path] = member
            elif isinstance(member, torch.Tensor) or (isinstance(member, int) and member % 16 == 0):
                made.attributes[path] = [["tt.divisibility", 16]]
    return made


def _widest(ptx: str, instruction: str) -> int:
    """Bytes that a thread moves by the widest global `instruction` ("ld" or "st")."""
    widths = [0]
    for vector, bits in re.findall(rf"\b{instruction}\.[\w.:]*?global[\w.:]*?(?:\.(v[248]))?\.[bfsu](\d+)\b", ptx):
        widths.append(int(vector[1:] or 1 if vector else 1) * int(bits) // 8)
    if instruction == "ld":
        widths += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.[\w.:]+ \[[^]]+\], \[[^]]+\], (\w+)", ptx)]
    return max(widths)


def _chosen_read_first(ptx: str) -> bool | None:
    """`Resources.chosen_read_first`, from the lines of kernels/ that the PTX says its instructions come from."""
    folder, source, events = Path(kernels.__file__).parent, "", ""
    for text in ptx.splitlines():
        if place := re.search(r"\.loc\s.*// (\w+\.py):(\d+):", text):
            source = linecache.getline(str(folder / place[1]), int(place[2])).strip()
        elif "ld.global" in text and source.startswith("chosen = tl.load(row"):
            events += "r"
        elif "st.global" in text and source.startswith("tl.store(row"):
            events += "w"
        elif re.search(r"\b(bar|barrier)\.sync", text):
            events += "b"
    if "r" not in events or "w" not in events:
        return None
    return "b" in events[events.rindex("r") : events.index("w")]


def compile_for(config: LaunchConfig, arch: int) -> Resources:
    """Compile one launch for sm_`arch` and read its resources; ptxas is the only one to know about spills."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = specialise(config)
    options = {key: config.constants[key] for key in LAUNCH_OPTIONS if key in config.constants}
    source = ASTSource(fn=config.kernel, signature=made.signature, constexprs=made.constants, attrs=made.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx, encoding="utf-8")
        tool = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [str(tool), "-v", target, str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    [registers] = re.findall(r"Used (\d+) registers", report)
    return Resources(
        name=config.name,
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        registers=int(registers),
        spill_bytes=sum(int(size) for size in re.findall(r"(\d+) bytes spill", report)),
        shared_bytes=compiled.metadata.shared,
        load_bytes=_widest(ptx, "ld"),
        store_bytes=_widest(ptx, "st"),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=len(re.findall(r"tcgen05\.mma", ptx)),
        async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        chosen_read_first=_chosen_read_first(ptx),
    )
