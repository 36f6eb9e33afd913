"""Standard streams and Ctrl-C of a command, from its first import on, whatever became of the streams.

A stream may be closed (`>&-`), full (/dev/full) or a pipe whose reader left. Of standard error only what is said is lost then; that
the headline cannot be printed is an error of one line. On standard error control characters are written out, but for those with
which progress bars move the cursor.
"""

import contextlib
import os
import re
import signal
import sys
from types import FrameType
from typing import Any, TextIO

from engine.shown_text import printable

_CURSOR = re.compile(r"(\r|\x1b\[A)")


def occupy_streams() -> None:
    """Open what is closed among descriptors 0 to 2, so that no file of ours is taken for a stream; writing to 1 still fails."""
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free one
            stream = os.fdopen(descriptor, "w" if descriptor else "r", encoding="utf-8", errors="backslashreplace", closefd=False)
            setattr(sys, ("stdin", "stdout", "stderr")[descriptor], stream)


def start_process() -> None:
    """For the first import of a process: streams are there, and Ctrl-C while modules are imported ends it in one line."""
    occupy_streams()
    signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


class Terminal:
    """Standard error, safe to write any text to, and writing to it never fails."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # full, closed, or nobody reads
            parts = _CURSOR.split(text)
            self.stream.write("".join(part if i % 2 else printable(part, lines=True) for i, part in enumerate(parts)))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def write_output(text: str = "") -> OSError | None:
    """Write what is left for standard output, and a line; returns the error if that fails, and writes nothing more then."""
    try:
        print(text, end="\n" if text else "", flush=True)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):  # what is still buffered would fail again at the end of the process
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
        return error if isinstance(error, OSError) else OSError(None, str(error))
    return None
