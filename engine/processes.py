"""The processes that `torchrun` started together: which one this is, what they agree on, and work divided among them."""

import gc
import os
from collections.abc import Callable, Sequence

import torch.distributed as dist


def rank() -> int:
    """This process's place among those `torchrun` started; 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def join() -> None:
    """Start the process group where several processes were started and none is up yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group()


def first_rank_says(function: Callable, *args):
    """`function(*args)` as computed by the first process, told to all."""
    if not _are_several():
        return function(*args)
    told = [function(*args) if rank() == 0 else None]
    dist.broadcast_object_list(told)
    return told[0]


def my_share(items: Sequence) -> Sequence:
    """Every n-th of the items, of n processes; all of them when alone."""
    return items[dist.get_rank() :: dist.get_world_size()] if _are_several() else items


def gather(results: dict) -> dict:
    """The results of all processes, in every process; they share no key."""
    if not _are_several():
        return results
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, results)
    return {key: value for part in parts for key, value in part.items()}


def leave() -> None:
    """End the process group, if there is one."""
    if _are_several():
        gc.collect()  # a Trainer and its DDP module are in cycles; freed after their group they now and then end the process in C++
        dist.destroy_process_group()


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized()
