"""How the processes that `torchrun` started together end, where one of them fails: one speaks, all end.

A process that fails leaves the others in an exchange that never ends (NCCL), or ends in words that name no reason (gloo). So the
first to fail puts its name into the store by which they found each other, and only it says why. The others look there once a
second, and end without a word and with its exit code.
"""

import os
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from engine import processes
from engine.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import Store

KEY = "failed"
SECONDS_BETWEEN_LOOKS = 1.0
GRACE = 4.0  # seconds in which a process may end by itself once another one has failed
# What gloo says in a process whose peer has ended.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "Connection refused")

_connection: "Store | None" = None
_watch: "_Watch | None" = None


def are_several() -> bool:
    """Whether there are others; no where the environment does not say so in numbers."""
    try:
        return processes.are_several()
    except InputError:
        return False


def failed_before(code: int) -> int | None:
    """The exit code of the process that failed before this one; None if this is the first, which is to say why it ends with `code`.

    None too where no store can be reached: then each process says what it knows.
    """
    store = _store()
    if store is None:
        return None
    mine = f"{processes.rank()} {code}"
    try:
        first = store.compare_set(KEY, "", mine).decode()
    except RuntimeError:  # it ended with the process that held it
        return code
    return None if first == mine else int(first.split()[1])


def leave(code: int) -> NoReturn:
    """End this process at once: what would close the exchange with the others in order could wait for them for ever."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    if _watch is not None and not _launcher_holds_store() and processes.rank() == 0:
        time.sleep(SECONDS_BETWEEN_LOOKS + GRACE)  # the store is this process's: the others must have looked there
    os._exit(code)


def watch() -> None:
    """Where there are others, end this process soon after one of them has failed, whatever it waits for. Until `close`."""
    global _watch
    if _watch is None and (store := _store()) is not None:
        _watch = _Watch(store)


def close() -> None:
    """Stop looking, and leave the others' group, where there is one."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None
    processes.close()


def is_loss(error: BaseException) -> bool:
    """Whether it says only that another process is gone."""
    return are_several() and isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


class _Watch(threading.Thread):
    def __init__(self, store: Any) -> None:
        super().__init__(daemon=True)
        self.store, self.stopped = store, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.stopped.wait(SECONDS_BETWEEN_LOOKS):
            try:
                failed = self.store.check([KEY])
            except RuntimeError:  # the store ended with its process, which had no more to say
                return
            if failed:
                code = int(self.store.get(KEY).decode().split()[1])
                if not self.stopped.wait(GRACE):
                    os._exit(code)

    def stop(self) -> None:
        """No thread may be within the store when the interpreter ends."""
        self.stopped.set()
        self.join()


def _store() -> "Store | None":
    """A connection of this process's own; None where it is alone, or nothing listens yet."""
    global _connection
    if _connection is None and are_several():
        import torch.distributed as dist

        if _launcher_holds_store() or dist.is_initialized():
            try:
                address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                timeout = timedelta(seconds=10)
                store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
            except (KeyError, ValueError, RuntimeError):
                return None
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            _connection = dist.PrefixStore(f"vesalius/{attempt}", store)
    return _connection


def _launcher_holds_store() -> bool:
    """Whether `torchrun` itself listens, so that the store outlives every process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
