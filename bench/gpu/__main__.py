"""Every kernel on the GPU at hand: correctness in bf16 against float64, then times at the shapes of our models, in ten minutes.

    python -m bench.gpu [--minutes 9] [--seconds 120] [--only TEXT] [--output bench/results]

In this order, each with a share of the time: the rates of a matmul and a copy here; small checks under compute-sanitizer where it
is installed (memcheck, racecheck); all checks; ours and eager at the goals; other ways to launch two kernels; what of these their
share left over; and with the rest torch.compile, TRL and Liger, each beside ours. Providers run interleaved. Times are medians
between device events with a cold L2, or of replayed CUDA graphs for what takes microseconds. `roof` is the time that the case's
FLOPs and bytes take at least, at the rates measured here, over the time it took.

Cases come from the other modules of bench/gpu/: `checks(device, tiny)`, `timings(device, tiny)`, `variants(device, tiny)`. Each
timing, and the checks of each op, have a process of their own. Whatever raises, crashes (an illegal access takes its process along)
or shows nothing for SECONDS is reported, and the rest goes on. Each result is appended to a file in OUTPUT as it is made; the last
line is JSON. Exit code 1 where a check or a launch of ours failed or a check was left out, 2 without a CUDA device. `--device cpu
--tiny` runs the cases small on the CPU, and writes where --output says. Compiling takes minutes, which the next call spares if it
finds TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR as this one left them.
"""

import argparse
import importlib
import itertools
import json
import pkgutil
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

import bench.gpu
from bench.gpu.job_processes import OVER, JobProcesses
from bench.measure import environment

# Seconds of the 540 that each phase may take; the peers have the rest, and what is left over comes before them.
SHARES = {"ceilings": 30, "sanitizer": 90, "checks": 120, "goals": 120, "variants": 60}
MACHINERY = {"__main__", "case_worker", "job_processes"}


class Unit(NamedTuple):
    """What one process is asked for: a job (bench.gpu.case_worker), and the sanitizer's tool that it runs under."""

    phase: str
    job: dict[str, Any]
    tool: str = ""


def case_modules() -> list[str]:
    """The modules of cases: all in bench/gpu/ but those that run them."""
    names = {module.name for module in pkgutil.iter_modules(bench.gpu.__path__)} - MACHINERY
    return sorted(f"bench.gpu.{name}" for name in names)


def units(modules: list[ModuleType], device: torch.device, tiny: bool, only: str) -> Iterator[Unit]:
    """All that is to be done, in order; nothing is built yet. `only`: what the names of checks and cases contain."""
    where = {"device": device.type, "tiny": tiny}
    yield Unit("ceilings", where | {"work": "ceilings", "names": ["ceilings"]})
    if device.type == "cuda":
        small = [(check.name, getattr(module, "SANITIZED", ())) for module in modules for check in module.checks(device, True)]
        names = [name for name, chosen in small if only in name and name.startswith(tuple(chosen))]
        for tool in ("memcheck", "racecheck") if names else ():
            yield Unit("sanitizer", where | {"tiny": True, "work": "checks", "names": names}, tool)
    for module in modules:
        names = [check.name for check in module.checks(device, tiny) if only in check.name]
        for _, group in itertools.groupby(names, lambda name: re.split(r"\W", name)[0]):
            yield Unit("checks", where | {"work": "checks", "names": list(group)})
    timings = [case for module in modules for case in module.timings(device, tiny) if only in case.name]
    variants = [case for module in modules if hasattr(module, "variants") for case in module.variants(device, tiny)]
    for phase, cases, providers in (
        ("goals", timings, "first"),
        ("variants", [case for case in variants if only in case.name], "all"),
        ("peers", [case for case in timings if case.peers], "peers"),
    ):
        yield from (Unit(phase, where | {"work": "timing", "names": [case.name], "providers": providers}) for case in cases)


class Bench:
    """A run: what is asked of processes, and what came of it."""

    def __init__(self, processes: JobProcesses, args: argparse.Namespace, where: dict[str, Any], path: Path | None):
        self.processes, self.where, self.path = processes, where, path
        self.minutes, self.seconds = args.minutes, args.seconds
        self.end = time.monotonic() + 60 * args.minutes
        self.ceiling: dict[str, Any] = {}
        self.failed: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[tuple[str, str]] = []

    def run(self, all_units: list[Unit]) -> None:
        """Phase by phase, what was put off, and the peers."""
        late: list[Unit] = []
        for phase, share in SHARES.items():
            end = time.monotonic() + share * self.minutes / 9
            for unit in (unit for unit in all_units if unit.phase == phase):
                if time.monotonic() < end:
                    self.do(unit)
                else:
                    late.append(unit)
        for unit in (*late, *(unit for unit in all_units if unit.phase == "peers")):
            self.do(unit)

    def do(self, unit: Unit) -> None:
        """A unit, in as many processes as it takes: one that crashes leaves the checks after it to the next."""
        names = list(unit.job["names"])
        if unit.tool and not shutil.which("compute-sanitizer"):
            names = self._leave_out(unit, names, "compute-sanitizer is not installed")
        if unit.job["work"] == "timing" and not self.ceiling:
            names = self._leave_out(unit, names, "the device's rates were not measured")
        while names:
            if self.end <= time.monotonic():
                names = self._leave_out(unit, names, OVER)
                continue
            roof = [self.ceiling.get("matmul_tflops", 0) * 1e12, self.ceiling.get("copy_gbps", 0) * 1e9]
            job, current = unit.job | {"names": names, "roof": roof}, names[0]
            for record in self.processes.run(job, self.seconds, self.end, unit.tool):
                current = record["name"]
                if record["kind"] in ("check", "ceilings"):
                    names = names[names.index(current) + 1 :]
                self._take(unit, record)
            names = self._after(unit, names, current, self.processes.ended)

    def _after(self, unit: Unit, names: list[str], current: str, ended: str) -> list[str]:
        """What is left to do of `names`, those without a result, when the process that came to `current` has ended."""
        if ended == OVER:
            return self._leave_out(unit, names, OVER)
        if unit.job["work"] == "timing":
            if ended:  # its providers have no rows, or not all of them
                provider = "a peer" if unit.phase == "peers" else "ours"
                self._row({"case": current, "provider": provider, "stopped": ended, "phase": unit.phase})
            return []
        if names:
            self._check(unit, names[0], False, ended or "it has no result")
        elif ended:
            self._check(unit, f"after {current}", False, ended)
        return names[1:]

    def _take(self, unit: Unit, record: dict[str, Any]) -> None:
        if record["kind"] == "ceilings":
            self.ceiling = {name: record[name] for name in ("matmul_tflops", "copy_gbps", "wide_sum")}
            rates = f"{self.ceiling['matmul_tflops']:.1f} TFLOP/s matmul, {self.ceiling['copy_gbps']:.0f} GB/s copy"
            print(f"{self.where['device']}: {rates}, float32 sum of bf16 products: {self.ceiling['wide_sum']}", file=sys.stderr)
        elif record["kind"] == "check":
            self._check(unit, record["name"], record["passed"], record["outcome"])
        elif record["kind"] == "row":
            self._row(record["row"] | {"phase": unit.phase})

    def _check(self, unit: Unit, name: str, passed: bool, outcome: str) -> None:
        name = f"{unit.tool}: {name}" if unit.tool else name
        print(f"{'ok' if passed else 'FAILED':6} {name:58} {outcome}", file=sys.stderr)
        self.failed += [] if passed else [name]
        self._append({"check": name, "passed": passed, "outcome": outcome})

    def _row(self, row: dict[str, Any]) -> None:
        print_row(row)
        self.rows.append(row)
        self._append(row | {name: self.ceiling[name] for name in ("matmul_tflops", "copy_gbps")})

    def _leave_out(self, unit: Unit, names: list[str], why: str) -> list[str]:
        self.left_out += [(f"{unit.phase}{unit.tool and ' ' + unit.tool}: {name}", why) for name in names]
        return []

    def _append(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | self.where) + "\n")

    def summary(self) -> dict[str, Any]:
        """What the last line says; goals are compared with the rows beside eager."""
        mine = [row for row in self.rows if row["provider"] == "ours"]
        goals = [row for row in mine if row["phase"] == "goals"]
        return {
            "device": self.where["device"],
            "failed_checks": self.failed,
            "stopped": [row["case"] for row in mine if "stopped" in row],
            "ours_ms": {row["case"]: row["ms"] for row in goals if "ms" in row},
            "goals_missed": [row["case"] for row in goals if row.get("goal_ms") and row.get("ms", 0) > row["goal_ms"]],
            "left_out": {why: [name for name, other in self.left_out if other == why] for _, why in self.left_out},
            **self.ceiling,
            "minutes": round(self.minutes - (self.end - time.monotonic()) / 60, 1),
        }


def print_row(row: dict[str, Any]) -> None:
    if "stopped" in row:
        print(f"{row['case']:44} {row['provider']:16} {row['stopped']}", file=sys.stderr)
        return
    goal = f"goal {row['goal_ms']:g} ms" if row["goal_ms"] and row["provider"] == "ours" else ""
    memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:7d} MB"
    numbers = f"{row['ms']:11.4f} ms {row['tflops']:8.1f} TFLOP/s {row['gbps']:8.1f} GB/s  roof {row['roof']:4.0%} {memory}"
    print(f"{row['case']:44} {row['provider']:16} {numbers}  {goal}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Correctness and times of every kernel on this GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small cases, to try the bench itself")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing goes on after this")
    parser.add_argument("--seconds", type=float, default=120.0, help="a check or case that shows nothing for so long is ended")
    parser.add_argument("--only", default="", help="only checks and cases whose name contains this")
    parser.add_argument("--cases", nargs="+", default=case_modules(), help="modules of cases")
    parser.add_argument("--output", type=Path, help="folder of the rows (on a GPU bench/results)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; `--device cpu --tiny` tries the bench itself", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    where = environment(device)
    folder = args.output or (Path(__file__).parents[1] / "results" if args.device == "cuda" and not args.tiny else None)
    name = f"gpu_{re.sub('[^a-z0-9]+', '_', where['device'].lower()).strip('_')}_{where['date']}_{time.strftime('%H%M%S')}.jsonl"
    with JobProcesses(args.cases) as processes:
        run = Bench(processes, args, where, None if folder is None else folder / name)
        try:
            modules = [importlib.import_module(name) for name in args.cases]
            run.run(list(units(modules, device, args.tiny, args.only)))
        except KeyboardInterrupt:
            run.left_out.append(("the rest", "interrupted"))
    summary = run.summary()
    print(json.dumps(summary))
    unchecked = any(name.startswith("checks:") or name == "the rest" for name, _ in run.left_out)
    return 1 if summary["failed_checks"] or summary["stopped"] or unchecked else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the summary of what is there, and no process left on the GPU
    sys.exit(main())
