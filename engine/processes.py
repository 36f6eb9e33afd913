"""The processes that `torchrun` started together: which one this is, what they agree on, and work divided among them."""

import gc
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

from engine.errors import InputError

Result = TypeVar("Result")


def rank() -> int:
    """This process's place among those `torchrun` started; 0 when alone."""
    return _number_from_environment("RANK", 0)


def are_several() -> bool:
    """Whether `torchrun` started more than this process."""
    return _number_from_environment("WORLD_SIZE", 1) > 1


def check_environment() -> None:
    """InputError where what `torchrun` sets is set by half or wrongly: processes would wait for one another, or nobody write."""
    _number_from_environment("LOCAL_RANK", 0)
    count = _number_from_environment("WORLD_SIZE", 1)
    if rank() >= max(count, 1):
        raise InputError(f"RANK {rank()} of the environment: expected less than WORLD_SIZE, {count} (torchrun sets both)")


def join() -> None:
    """Start the process group where several processes were started and none is up yet."""
    if are_several():
        import torch.distributed as dist  # here: it takes two seconds, and most commands run alone

        if not dist.is_initialized():
            dist.init_process_group()


def close() -> None:
    """End the process group, if there is one."""
    if dist := _group():
        gc.collect()  # a Trainer and its DDP module are in cycles; freed after their group they now and then end the process in C++
        dist.destroy_process_group()


def broadcast_from_first(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, called in the first process only; its result is returned in every process."""
    dist = _group()
    if not dist:
        return function(*args)
    results: list[Any] = [function(*args) if rank() == 0 else None]
    dist.broadcast_object_list(results)
    return results[0]


def share_first(tensors: Iterable["Tensor"]) -> None:
    """Every process's tensors become those of the first, in place."""
    if dist := _group():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def my_share(items: Sequence) -> Sequence:
    """Of n processes, every n-th item, beginning with this process's rank; all items when alone."""
    dist = _group()
    return items[dist.get_rank() :: dist.get_world_size()] if dist else items


def gather(results: dict) -> dict:
    """The results of all processes, in every process; no two processes may use the same key."""
    dist = _group()
    if not dist:
        return results
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, results)
    return {key: value for part in parts for key, value in part.items()}


def _number_from_environment(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"\d{1,9}", text):
        raise InputError(f"the environment's {name}={text}: expected a whole number, as torchrun sets it")
    return int(text)


def _group() -> ModuleType | None:
    """`torch.distributed` where a process group is up, otherwise None. No group is up where nothing imported torch."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None
