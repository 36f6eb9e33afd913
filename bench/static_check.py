"""Compile every kernel of kernels/ in the configurations it launches with, for the architectures it is for, without a GPU.

    python -m bench.static_check [--arch 80 89 90 100] [--only TEXT] [--markdown]

Any module of kernels/ with `launch_configs()` is found. The table on standard error shows a thread's registers, spilled bytes,
shared memory a block, the widest global load and store, matrix instructions (mma.sync, wgmma, tcgen05), and the share of a
multiprocessor's warps that can be resident; `--markdown` prints it as one for the README. The gate: no spills; a program fits a
multiprocessor; 16-byte loads in the GRPO row kernel at an aligned vocabulary; a barrier between the load of a row's chosen logit
and the first store over the row; and no tcgen05 in the kernels that add several products into one accumulator, which only
mma.sync and wgmma do in order. Exit code 1 where it fails, 2 without Triton.
"""

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator

from tqdm import tqdm

import kernels
from bench.offline_compile import SHARED, Resources, compile_for
from kernels.language import HAS_TRITON
from kernels.launch import LaunchConfig

WIDE = "grpo row, "
ODD = "odd vocabulary"
OVERWRITES = ("grpo row, ", "logit gradient")  # a row by its gradient
WITHOUT = "without gradient"
TWO_PRODUCTS = ("token to image, backward", "moe gate")  # those of the gate are the terms of a float32 product
HEADER = ("kernel", "sm", "warps", "registers", "spilled B", "shared B", "load B", "store B", "mma", "occupancy")


def launches() -> Iterator[LaunchConfig]:
    """The launch configurations of every kernel module, by module name."""
    for module in sorted(pkgutil.iter_modules(kernels.__path__), key=lambda module: module.name):
        listing = getattr(importlib.import_module(f"kernels.{module.name}"), "launch_configs", None)
        yield from listing() if listing else ()


def failures(results: list[Resources]) -> list[str]:
    """What the gate objects to, one line each."""
    lines = [f"{r.name} on sm_{r.arch} spills {r.spill_bytes} bytes" for r in results if r.spill_bytes]
    lines += [
        f"{r.name} does not fit sm_{r.arch}: {r.shared_bytes} bytes shared" for r in results if not r.blocks_per_multiprocessor
    ]
    for r in results:
        if r.name.startswith(WIDE) and ODD not in r.name and r.load_bytes < 16:
            lines.append(f"{r.name} on sm_{r.arch} loads {r.load_bytes} bytes at a time, not 16")
        if r.name.startswith(OVERWRITES) and WITHOUT not in r.name and not r.chosen_read_first:
            lines.append(f"{r.name} on sm_{r.arch} may write over its chosen logit before every warp has read it")
        if r.name.startswith(TWO_PRODUCTS) and r.tcgen05:
            lines.append(f"{r.name} on sm_{r.arch} adds two products into one accumulator by tcgen05, which may lose one")
    return lines


def row_of(r: Resources) -> tuple:
    """One line of the table."""
    matrix = r.mma + r.wgmma + r.tcgen05
    sizes = (r.num_warps, r.registers, r.spill_bytes, r.shared_bytes, r.load_bytes, r.store_bytes, matrix)
    return r.name, r.arch, *sizes, f"{r.occupancy:.0%}"


def print_table(results: list[Resources], markdown: bool) -> None:
    rows: list[tuple] = [HEADER, *(row_of(r) for r in results)]
    if markdown:
        rows.insert(1, ("---", *["---:"] * (len(HEADER) - 1)))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        cells = [
            str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel as it is launched and check registers, spills and widths.")
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED), choices=tuple(SHARED))
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--markdown", action="store_true", help="print the table in markdown")
    args = parser.parse_args(argv)
    if not HAS_TRITON:
        print("error: Triton is not installed here (pip install triton)", file=sys.stderr)
        return 2
    chosen = [config for config in launches() if args.only in config.name]
    jobs = [(config, arch) for config in chosen for arch in args.arch if arch in config.archs]
    results = [compile_for(config, arch) for config, arch in tqdm(jobs, desc="compiling", file=sys.stderr)]
    print_table(results, args.markdown)
    problems = failures(results)
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    summary = {
        "kernels": len({config.kernel for config in chosen}),
        "configurations": len(chosen),
        "architectures": args.arch,
        "spills": sum(r.spill_bytes for r in results),
        "max_registers": max((r.registers for r in results), default=0),
        "failures": problems,
    }
    print(json.dumps(summary))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
