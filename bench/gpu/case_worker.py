"""One process of bench.gpu: it does one job and writes each result, the moment that it has it, as a line of JSON.

    python -m bench.gpu.case_worker RESULTS MODULE ...

Imports come first, then the job is read from standard input: bench.gpu has the next process import while this one works. A job is
{"work": "ceilings" | "checks" | "timing", "device", "tiny", "names"}, for a timing also "providers" and "roof". A record says in
"kind" what it is: "ready" (imports are done), "begin" (a check or case is), "check", "row" or "ceilings".

An illegal access spoils the whole context of its process: after it the process ends, and bench.gpu goes on in another one.
"""

import json
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.measure import TimedCase, Timing, as_cuda_graph, cpu_seconds, cuda_seconds

GRAPH_RUNS = 20
SECONDS_A_CASE = 6.0
FIRST = ("ours", "eager", "transformers")  # without torch.compile and other projects' kernels: known to start at once


def reason(error: Exception) -> str:
    """One short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def settle(device: torch.device) -> None:
    """Wait for the device, so that an error of what was launched shows here, and give its memory back."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def ceilings(device: torch.device, tiny: bool) -> dict[str, Any]:
    """FLOP/s of a square bf16 matmul, bytes/s of a copy, and whether a GEMM of bf16 adds in fp32 here (the head's dweight)."""
    side, size = (256, 1 << 20) if tiny else (8192, 1 << 30)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    clock = cuda_seconds if device.type == "cuda" else cpu_seconds
    runs = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    clock(runs, 3)
    seconds = clock(runs, 10)
    rates = {"matmul_tflops": 2 * side**3 / seconds["matmul"] / 1e12, "copy_gbps": 2 * size / seconds["copy"] / 1e9}
    return rates | {"wide_sum": _wide_sum(a, b)}


def _wide_sum(a: torch.Tensor, b: torch.Tensor) -> str:
    """The relative error of the float32 sum of half factors' products, 4e-3 where products are rounded; or why there is none."""
    total = torch.zeros(len(a), len(a), device=a.device)
    try:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
        settle(a.device)
    except Exception as error:
        return reason(error)
    exact = a[:, :64].T.double() @ b.double()
    return f"{(total[:64] - exact).norm() / exact.norm():.1e}"


def run_checks(modules: list[ModuleType], device: torch.device, tiny: bool, names: list[str]) -> Iterator[dict[str, Any]]:
    """Every check that is named, and what came of it."""
    for check in (check for module in modules for check in module.checks(device, tiny) if check.name in names):
        yield {"kind": "begin", "name": check.name}
        try:
            error, allowed = check.run()
            settle(device)
            passed, outcome = bool(error <= allowed), f"error {error:.1e}  allowed {allowed:.1e}"
        except Exception as problem:
            passed, outcome = False, reason(problem)
        yield {"kind": "check", "name": check.name, "passed": passed, "outcome": outcome}
        settle(device)


def try_out(run: Any, graphed: bool, on_cuda: bool) -> tuple:
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


def run_timing(timing: Timing, device: torch.device, roof: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """Time the providers of one case interleaved; one row each, at once for one that cannot run here."""
    ready: dict[str, tuple] = {}
    on_cuda = device.type == "cuda"
    for name, run in timing.providers.items():
        try:
            ready[name] = try_out(run, timing.graphed, on_cuda)
        except Exception as error:
            yield {"provider": name, "stopped": reason(error)}
        settle(device)
    repetitions = min(50, max(5, int(SECONDS_A_CASE / (sum(once for _, _, once, _ in ready.values()) + 1e-6))))
    clock = cuda_seconds if on_cuda else cpu_seconds
    seconds = clock({name: timed for name, (timed, *_) in ready.items()}, repetitions)
    least = max(timing.flops / roof[0], timing.bytes / roof[1])
    for name, (_, runs, _, memory) in ready.items():
        value = seconds[name] / runs
        rates = {"tflops": round(timing.flops / value / 1e12, 2), "gbps": round(timing.bytes / value / 1e9, 1)}
        measured = {"ms": round(value * 1e3, 5), **rates, "roof": round(least / value, 3), "peak_mb": memory}
        yield {"provider": name, **measured, "goal_ms": timing.goal_ms, "repetitions": repetitions}


def cases(module: ModuleType, device: torch.device, tiny: bool) -> Iterator[TimedCase]:
    """The timings of a module, and the other ways to launch a kernel that it has in store."""
    for listing in ("timings", "variants"):
        yield from getattr(module, listing, lambda *_: ())(device, tiny)


def run_case(modules: list[ModuleType], device: torch.device, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a case, of the first providers, of the peers (and ours beside them), or of all."""
    [name] = job["names"]
    case = next(case for module in modules for case in cases(module, device, job["tiny"]) if case.name == name)
    yield {"kind": "begin", "name": name}
    timing = case.build()
    chosen = {
        "first": [provider for provider in timing.providers if provider in FIRST],
        "peers": [provider for provider in timing.providers if provider == "ours" or provider not in FIRST],
        "all": list(timing.providers),
    }[job["providers"]]
    timing = timing._replace(providers={provider: timing.providers[provider] for provider in chosen})
    if job["tiny"]:
        timing = timing._replace(goal_ms=None)
    for row in run_timing(timing, device, job["roof"]):
        yield {"kind": "row", "name": name, "row": {"case": name} | row}


def perform(job: dict[str, Any], modules: list[ModuleType]) -> Iterator[dict[str, Any]]:
    """The records of a job."""
    device = torch.device(job["device"])
    if job["work"] == "ceilings":
        yield {"kind": "begin", "name": "ceilings"}
        yield {"kind": "ceilings", "name": "ceilings"} | ceilings(device, job["tiny"])
    elif job["work"] == "checks":
        yield from run_checks(modules, device, job["tiny"], job["names"])
    else:
        yield from run_case(modules, device, job)


def main(results: str, *names: str) -> None:
    with Path(results).open("a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        modules = [import_module(name) for name in names]
        write({"kind": "ready"})
        job = sys.stdin.readline()
        for record in perform(json.loads(job), modules) if job else ():
            write(record)


if __name__ == "__main__":
    main(*sys.argv[1:])
