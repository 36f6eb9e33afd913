"""How the benches of the kernels measure: errors, medians of interleaved repetitions, peak resident memory, and where they ran."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.language import HAS_TRITON, triton


class Check(NamedTuple):
    """A claim of correctness: `run` returns (error, largest error allowed)."""

    name: str
    run: Callable[[], tuple[float, float]]


class Timing(NamedTuple):
    """What a case times: callables by provider, the first ours; what the case must compute and move at least; the goal.

    `graphed`: so short that it is timed as a replayed CUDA graph, without the host's part.
    """

    providers: Mapping[str, Callable[[], object]]
    flops: float
    bytes: float
    goal_ms: float | None = None
    graphed: bool = False


class TimedCase(NamedTuple):
    """A timing that is built when its turn comes, as its tensors take memory. `peers`: other providers than ours and eager."""

    name: str
    build: Callable[[], Timing]
    peers: bool = True


def with_gradients(function, leaves, dtype, *rest, **options) -> list[torch.Tensor]:
    """What `function` returns (the first of several) and the gradients of the leaves, computed in `dtype`, as float64.

    The gradient of an output that is no scalar is random, the same for every function and dtype.
    """
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    result = function(*leaves, *rest, **options)
    y = result[0] if isinstance(result, tuple) else result
    generator = torch.Generator(y.device).manual_seed(1)
    grad_output = torch.randn(y.shape, device=y.device, generator=generator).bfloat16().to(y.dtype) if y.dim() else None
    return [tensor.detach().double() for tensor in (y, *torch.autograd.grad(y, leaves, grad_output))]


def relative_errors(values, truth) -> torch.Tensor:
    """The norm of each tensor's error over the norm of the truth. A tensor, whose `max` is NaN where any error is."""
    pairs = zip(values, truth, strict=True)
    return torch.stack([(value - exact).norm() / exact.norm().clamp(min=1e-2) for value, exact in pairs])


def largest_errors(values, truth) -> torch.Tensor:
    """As `relative_errors`, of the largest element instead of the norm: one wrong element is seen among millions."""

    def error(value, exact):
        return (value - exact).abs().max() / exact.abs().max().clamp(min=1e-2 * exact.numel() ** -0.5)

    return torch.stack([error(value, exact) for value, exact in zip(values, truth, strict=True)])


def against_eager(ours, eager, truth, dtype=torch.bfloat16) -> tuple[float, float]:
    """The largest error in units of what is allowed: twice eager's in the same dtype, and a rounding of that dtype (in the
    norm) or four (in the largest element, whose error varies more)."""
    rounding = torch.finfo(dtype).eps / 2
    kinds = ((relative_errors, rounding), (largest_errors, 4 * rounding))
    return torch.cat([errors(ours, truth) / (2 * errors(eager, truth) + floor) for errors, floor in kinds]).max().item(), 1.0


def training(function, leaves, *rest, grad_output=None, **options) -> Callable[[], None]:
    """A callable to time: forward and backward, gradients dropped."""

    def run():
        result = function(*leaves, *rest, **options)
        y = result[0] if isinstance(result, tuple) else result
        torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], grad_output)

    return run


@torch.no_grad()
def without_grad(function, *arguments, **options):
    return function(*arguments, **options)


def cpu_seconds(providers: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median process CPU time of each callable, one warm-up, repetitions interleaved so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for repetition in range(repetitions + 1):
        for name, run in providers.items():
            start = time.process_time()
            run()
            if repetition:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def cuda_seconds(providers: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median device time of each callable between events, repetitions interleaved, the L2 cache overwritten before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in providers}
    for _ in range(repetitions):
        for name, run in providers.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3 for name, pairs in events.items()}


def as_cuda_graph(run: Callable[[], object], times: int) -> Callable[[], None]:
    """A callable that replays `times` runs recorded as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            run()
    return graph.replay


def peak_resident_bytes(run: Callable[[], object]) -> int:
    """What `run()` adds at most to the resident memory of this process (Linux: its high-water mark is reset first).

    The system counts in batches a processor, so that the mark may lie some pages below where it was before: that is 0.
    """

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before)


def _processor() -> str:
    """The name of the CPU."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: torch.device) -> dict:
    """What a row of results must say about where it was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if HAS_TRITON else None,
        "date": time.strftime("%Y-%m-%d"),
    }
