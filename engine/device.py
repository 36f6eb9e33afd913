"""What this process computes on, and how much memory it has held."""

import os
import sys

import torch


def describe_device() -> str:
    """What this process computes on, e.g. `cpu (2 threads)` or `cuda:0 NVIDIA H200 (139 GiB)`, and how to use GPUs left idle."""
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    index = torch.cuda.current_device()
    device = torch.cuda.get_device_properties(index)
    described, count = f"cuda:{index} {device.name} ({device.total_memory / 2**30:.0f} GiB)", torch.cuda.device_count()
    if count == 1 or "WORLD_SIZE" in os.environ:
        return described
    return f"{described}, one of {count} (torchrun --nproc_per_node={count} -m in place of python -m uses all)"


def local_device() -> torch.device:
    """The device of this process: its own GPU among those of `torchrun`, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def inference_dtype(device: torch.device) -> torch.dtype:
    """Of a model's weights where it only answers: bfloat16 on CUDA, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def one_thread_if_small(small: bool, device: torch.device) -> None:
    """Compute a small model on one CPU thread: its matrices are so small that a second thread mostly waits for the first."""
    if small and device.type == "cpu":
        torch.set_num_threads(1)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far, in 1e9 bytes: allocated on a CUDA device; for any other, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return _peak_resident_bytes() / 1e9


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        import psutil  # there is no `resource` on Windows

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
