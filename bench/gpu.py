"""Every kernel on the GPU at hand: correctness in bf16 against float64, then times at the shapes of our models.

    python -m bench.gpu [--minutes 8] [--only TEXT] [--output bench/results]

Cases come from the modules bench.gpu_*: `checks(device, tiny)` and `timings(device, tiny)`. Providers are ours, eager,
torch.compile, transformers for the mask decoder, and TRL and Liger where they can be imported; they run interleaved. Times are
medians between device events with a cold L2, or of replayed CUDA graphs for what takes microseconds. `roof` is the time that the
case's FLOPs and bytes take at least, at the matmul rate and copy bandwidth measured here, over the time it took. Rows go to OUTPUT
as JSON lines; the last line is JSON. Whatever fails is reported and the rest goes on. Exit code 1 where a check or a launch of
ours failed, 2 without a CUDA device. `--device cpu --tiny` runs the same cases small on the CPU and writes nothing. Compiling
takes most of the minutes: `--only decoder`, then `--only head`, and so on, fit calls of ten minutes.
"""

import argparse
import importlib
import json
import pkgutil
import re
import sys
import time
from pathlib import Path

import torch

import bench
from bench.measure import Timing, as_cuda_graph, cpu_seconds, cuda_seconds, environment
from engine.files import write_whole

GRAPH_RUNS = 20
SECONDS_A_CASE = 6.0


def case_modules() -> list:
    """The modules of cases, bench.gpu_*."""
    names = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if module.name.startswith("gpu_"))
    return [importlib.import_module(f"bench.{name}") for name in names]


def ceilings(device: torch.device, tiny: bool) -> tuple[float, float]:
    """(FLOP/s of a square bf16 matmul, bytes/s of a copy) of this device."""
    side, size = (256, 1 << 20) if tiny else (8192, 1 << 30)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    clock = cuda_seconds if device.type == "cuda" else cpu_seconds
    runs = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    clock(runs, 3)
    seconds = clock(runs, 10)
    return 2 * side**3 / seconds["matmul"], 2 * size / seconds["copy"]


def reason(error: Exception) -> str:
    """One short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def run_checks(modules: list, device: torch.device, args) -> list[str]:
    """Run every check, print a line each, return the names of those that failed."""
    failed = []
    for check in (check for module in modules for check in module.checks(device, args.tiny) if args.only in check.name):
        try:
            error, allowed = check.run()
            passed, outcome = error <= allowed, f"error {error:.1e}  allowed {allowed:.1e}"
        except Exception as problem:
            passed, outcome = False, reason(problem)
        print(f"{'ok' if passed else 'FAILED':6} {check.name:58} {outcome}", file=sys.stderr)
        failed += [] if passed else [check.name]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def try_out(run, graphed: bool, on_cuda: bool) -> tuple:
    """(callable to time, runs in it, seconds of one call, peak memory in MB) of a provider, after a first run that compiles."""
    run()
    memory = None
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        memory = (torch.cuda.max_memory_allocated() - before) >> 20
    runs = GRAPH_RUNS if graphed and on_cuda else 1
    timed = as_cuda_graph(run, runs) if runs > 1 else run
    start = time.perf_counter()
    timed()
    if on_cuda:
        torch.cuda.synchronize()
    return timed, runs, time.perf_counter() - start, memory


def run_timing(timing: Timing, device: torch.device, roof: tuple[float, float]) -> list[dict]:
    """Time the providers of one case interleaved; one row each, also for one that cannot run here."""
    ready, rows = {}, []
    on_cuda = device.type == "cuda"
    for name, run in timing.providers.items():
        try:
            ready[name] = try_out(run, timing.graphed, on_cuda)
        except Exception as error:
            rows.append({"case": timing.name, "provider": name, "stopped": reason(error)})
        if on_cuda:
            torch.cuda.empty_cache()
    repetitions = min(50, max(5, int(SECONDS_A_CASE / (sum(once for _, _, once, _ in ready.values()) + 1e-6))))
    clock = cuda_seconds if on_cuda else cpu_seconds
    seconds = clock({name: timed for name, (timed, *_) in ready.items()}, repetitions)
    least = max(timing.flops / roof[0], timing.bytes / roof[1])
    for name, (_, runs, _, memory) in ready.items():
        value = seconds[name] / runs
        rates = {"tflops": round(timing.flops / value / 1e12, 2), "gbps": round(timing.bytes / value / 1e9, 1)}
        measured = {"ms": round(value * 1e3, 5), **rates, "roof": round(least / value, 3), "peak_mb": memory}
        rows.append({"case": timing.name, "provider": name, **measured, "goal_ms": timing.goal_ms, "repetitions": repetitions})
    return rows


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        if "stopped" in row:
            print(f"{row['case']:44} {row['provider']:12} {row['stopped']}", file=sys.stderr)
            continue
        goal = f"goal {row['goal_ms']:g} ms" if row["goal_ms"] and row["provider"] == "ours" else ""
        memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:7d} MB"
        numbers = f"{row['ms']:11.4f} ms {row['tflops']:8.1f} TFLOP/s {row['gbps']:8.1f} GB/s  roof {row['roof']:4.0%} {memory}"
        print(f"{row['case']:44} {row['provider']:12} {numbers}  {goal}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Correctness and times of every kernel on this GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small cases, to try the bench itself")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is begun after this")
    parser.add_argument("--only", default="", help="only checks and cases whose name contains this")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the rows")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; `--device cpu --tiny` tries the bench itself", file=sys.stderr)
        return 2
    start, device = time.monotonic(), torch.device(args.device)
    modules, where = case_modules(), environment(device)
    failed = run_checks(modules, device, args)
    roof = ceilings(device, args.tiny)
    print(f"{where['device']}: {roof[0] / 1e12:.1f} TFLOP/s matmul, {roof[1] / 1e9:.0f} GB/s copy", file=sys.stderr)
    rows, left_out = [], []
    for module in modules:
        for timing in module.timings(device, args.tiny):
            if args.only not in timing.name:
                continue
            if time.monotonic() - start > 60 * args.minutes:
                left_out.append(timing.name)
                continue
            made = run_timing(timing._replace(goal_ms=None) if args.tiny else timing, device, roof)
            print_rows(made)
            rows += made
            if device.type == "cuda":
                torch.cuda.empty_cache()
    ceiling = {"matmul_tflops": round(roof[0] / 1e12, 1), "copy_gbps": round(roof[1] / 1e9)}
    rows = [row | ceiling | where for row in rows]
    name = f"gpu_{re.sub('[^a-z0-9]+', '_', where['device'].lower()).strip('_')}_{where['date']}.jsonl"
    if device.type == "cuda" and rows and not args.tiny:
        write_whole(args.output / name, "".join(json.dumps(row) + "\n" for row in rows))
    mine = [row for row in rows if row["provider"] == "ours"]
    stopped = [row["case"] for row in mine if "stopped" in row]
    summary = {
        "device": where["device"],
        "failed_checks": failed,
        "stopped": stopped,
        "ours_ms": {row["case"]: row["ms"] for row in mine if "ms" in row},
        "goals_missed": [row["case"] for row in mine if row.get("goal_ms") and row["ms"] > row["goal_ms"]],
        "left_out": left_out,
        **ceiling,
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    print(json.dumps(summary))
    return 1 if failed or stopped else 0


if __name__ == "__main__":
    sys.exit(main())
