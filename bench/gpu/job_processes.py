"""Processes that do the jobs of bench.gpu one after another (bench.gpu.case_worker), so that none can spoil the next.

Starting costs seconds of imports: the next process makes them while the present one works, then waits for its job.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import bench

START_SECONDS = 180.0  # for imports
PAUSE = 0.05
OVER = "the minutes are over"
# Under compute-sanitizer each allocation is one of its own, so that what lies beside it is nobody's.
SANITIZER = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
FOUND = 99  # its exit code where it found an error


class JobProcesses:
    """A context: `run` gives a job to a process and yields its records; `ended` then says why the process ended too early.

    It is empty where the process did its job, and OVER where time was up. At the context's end nothing is left running.
    """

    def __init__(self, modules: list[str]):
        self.modules, self.ended = modules, ""
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._count = 0
        self._next: tuple[subprocess.Popen[str], Path] | None = None

    def __enter__(self) -> "JobProcesses":
        with _uninterrupted():
            self._next = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._next is not None:
            _kill(self._next[0])
        self._folder.cleanup()

    def run(self, job: dict[str, Any], seconds: float, end: float, tool: str = "") -> Iterator[dict[str, Any]]:
        """The records of a job as they are made. The process is killed after `seconds` without one, and when the monotonic clock
        is at `end`. `tool`: compute-sanitizer's, to run under."""
        process = None
        try:
            with _uninterrupted():
                if tool:
                    process, path = self._start(tool)
                else:
                    process, path = self._next or self._start()
                    self._next = self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.close()
            except BrokenPipeError:  # it ended at its imports; its exit code says how
                pass
            self.ended = yield from self._follow(process, path, seconds, end)
        finally:
            if process is not None:
                _kill(process)

    def _start(self, tool: str = "") -> tuple[subprocess.Popen[str], Path]:
        self._count += 1
        path = Path(self._folder.name, f"{self._count}.jsonl")
        path.touch()
        command = [sys.executable, "-m", "bench.gpu.case_worker", str(path), *self.modules]
        if tool:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5", *command]
        root = str(Path(bench.__file__).parents[1])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = os.environ | {"PYTHONPATH": paths} | (SANITIZER if tool else {})
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": 2, "text": True, "env": variables}
        return subprocess.Popen(command, start_new_session=True, **options), path

    def _follow(
        self, process: subprocess.Popen[str], path: Path, seconds: float, end: float
    ) -> Generator[dict[str, Any], None, str]:
        """Yields records; returns why the process was ended or ended badly."""
        limit, last = START_SECONDS, time.monotonic()
        with path.open(encoding="utf-8") as file:
            while True:
                running = process.poll() is None  # asked first: what it wrote before its end is read
                for record in _whole_lines(file):
                    limit, last = seconds, time.monotonic()
                    if record["kind"] != "ready":
                        yield record
                if not running:
                    return _ending(process.returncode)
                if time.monotonic() > end:
                    return OVER
                if time.monotonic() - last > limit:
                    return f"nothing for {limit:.0f} s: ended"
                time.sleep(PAUSE)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within it signals wait: an exception while a process starts would leave one that nobody knows of."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _whole_lines(file: TextIO) -> Iterator[dict[str, Any]]:
    """The records that are there from here on; a line that is being written stays for the next time."""
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield json.loads(line)


def _ending(code: int) -> str:
    """Why a process ended, empty where it did its job."""
    if code == FOUND:
        return "compute-sanitizer found errors, see above"
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}" if code else ""


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:  # the driver does not let go of it: the next may still work
        pass
