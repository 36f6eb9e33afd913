"""Worker processes of a data loader: settings that suit one another, no signals of their own, one line where one has ended."""

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Iterator
from typing import Any

from engine.command.settings import refuse
from engine.errors import InputError

ENDED = "DataLoader worker (pid"  # how PyTorch begins the errors that say that a worker is no more


def check_worker_settings(args: Any) -> None:
    """InputError for `dataloader_` settings of `transformers.TrainingArguments` that PyTorch refuses late, or that shuffle rows."""
    method, known = args.dataloader_multiprocessing_context, multiprocessing.get_all_start_methods()
    alone = "without workers: give --dataloader_num_workers too"
    workers = args.dataloader_num_workers > 0
    refuse(
        [
            (method is None or method in known, f"--dataloader_multiprocessing_context {method}: expected {' or '.join(known)}"),
            (method is None or workers, f"--dataloader_multiprocessing_context {method} {alone}"),
            (
                args.dataloader_prefetch_factor is None or workers,
                f"--dataloader_prefetch_factor {args.dataloader_prefetch_factor} {alone}",
            ),
            (
                workers or not args.dataloader_persistent_workers,
                f"--dataloader_persistent_workers {alone}",
            ),
            (
                args.dataloader_in_order,
                "--dataloader_in_order false is not supported: no run would see its rows in the order of another",
            ),
        ]
    )


def shield_workers(loader: Any) -> None:
    """Have the workers of a `torch.utils.data.DataLoader` take no SIGINT and no SIGTERM, whoever else of their group gets it.

    Whoever started them finishes what it is at, and they end with it. It is not enough that each asks for this itself: one that is
    spawned imports for seconds before.
    """
    begin = loader._get_iterator

    def begin_shielded() -> Any:
        with _held_back():
            return begin()

    loader._get_iterator = begin_shielded


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Inside, the error that a worker has been killed is an InputError."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not (str(error).startswith(ENDED) if isinstance(error, RuntimeError) else _one_has_ended()):
            raise
        advice = "was it killed for want of memory? Fewer --dataloader_num_workers need less"
        raise InputError(f"a worker of the data loader has ended: {advice}") from error


def _one_has_ended() -> bool:
    """Whether a worker is no more: what it was sending may break off a moment before PyTorch hears of its end."""
    from torch._C import _error_if_any_worker_fails

    try:
        time.sleep(1)  # in which the signal of its end may raise this error, too
        _error_if_any_worker_fails()
    except RuntimeError as error:
        return str(error).startswith(ENDED)
    return False


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Inside, both signals wait; processes that are started inherit this for good."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker  # POSIX's

    resource_tracker.ensure_running()  # which lets both signals through again where it has to be started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
