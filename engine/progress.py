"""Progress bars: drawn in place on a terminal, whole lines at most every ten seconds where standard error is a file or a pipe."""

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from engine.processes import rank

SECONDS_BETWEEN_LINES = 10.0


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """`tqdm(iterable, **options)` on standard error, by default of the first process only (`disable` says otherwise).

    Where standard error is no terminal, a bar writes a line every ten seconds, and one at its end unless `leave` is False.
    """
    options.setdefault("disable", rank() != 0)
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "position": 0, "dynamic_ncols": False}  # position 0: no cursor is moved
    return tqdm(iterable, **options)


class _Lines:
    """What tqdm draws over and over, as lines of `stream`: the newest drawing when ten seconds have passed, and the last one."""

    def __init__(self, stream: TextIO):
        self.stream, self.encoding = stream, getattr(stream, "encoding", None)
        self.newest, self.written = "", time.monotonic()

    def write(self, text: str) -> None:
        """tqdm writes "\\r" and the bar, "\\r" and spaces to wipe it out, and "\\n" after the last bar, if that is to stay."""
        drawn = text.strip()
        self.newest = drawn or self.newest
        if text == "\n" or drawn and time.monotonic() - self.written >= SECONDS_BETWEEN_LINES:
            self.stream.write(f"{self.newest}\n")
            self.stream.flush()
            self.written = time.monotonic()

    def flush(self) -> None:
        self.stream.flush()
