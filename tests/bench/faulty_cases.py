"""Cases for bench.gpu that fail in every way: what raises, crashes or hangs, beside what works."""

import os
import signal
import time

from bench.measure import Check, TimedCase, Timing


def _raise():
    raise ZeroDivisionError("division by zero")


def _crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def checks(device, tiny):
    """A group, the first and the last of which pass."""
    yield Check("good first", lambda: (0.0, 1.0))
    yield Check("good, but not exact", lambda: (2.0, 1.0))
    yield Check("good, not a number", lambda: (float("nan"), 1.0))
    yield Check("good, raises", _raise)
    yield Check("good, crashes", _crash)
    yield Check("good, hangs", lambda: time.sleep(100))
    yield Check("good last", lambda: (1.0, 1.0))


def timings(device, tiny):
    """A provider that raises costs its row, one that crashes its case."""
    yield TimedCase("fine", lambda: Timing({"ours": int, "eager": _raise, "compile": int}, 1.0, 1.0, goal_ms=1e9))
    yield TimedCase("crashes", lambda: Timing({"ours": _crash, "eager": int}, 1.0, 1.0), peers=False)
    yield TimedCase("its peer crashes", lambda: Timing({"ours": int, "compile": _crash}, 1.0, 1.0))


def variants(device, tiny):
    """Of one kernel."""
    yield TimedCase("fine, other launches", lambda: Timing({"ours": int, "64 x 8 w": int}, 1.0, 1.0))
