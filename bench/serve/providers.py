"""Processes that are timed from outside: each is asked for one piece of work after another, and answers when it is done."""

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import psutil

from engine.errors import InputError
from engine.progress import progress

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
LIBTORCH = ("libtorch", "libc10", "libgomp", "libiomp")  # how the names of its libraries begin


class Worker:
    """A process that reads a line of JSON a piece of work, and writes one when it is done; the first says that it is ready."""

    def __init__(self, command: list[str], log: Path):
        self._log = log.open("w", encoding="utf-8")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, **pipes, text=True, encoding="utf-8", env=environment)
        self._lines: Any = self._process.stdout
        self.watched = psutil.Process(self._process.pid)
        try:
            self.about = self._answer()
        except RuntimeError:
            self.close()
            raise

    def ask(self, work: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a piece of work; RuntimeError with the last line of its log where the process has ended."""
        pipe: Any = self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(work) + "\n")
            pipe.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            self._process.wait()
            said = Path(self._log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(said[-1][:200] if said else f"ended with {self._process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._log.close()


class Server(Worker):
    """One of our binaries with `--serve 0`: its first line of JSON has the address."""

    def __init__(self, command: list[str], log: Path):
        super().__init__(command, log)
        self._session = httpx2.Client(base_url=self.about["address"], timeout=600)

    def ask(self, work: Mapping[str, Any]) -> dict[str, Any]:
        """POST `work["json"]` to `work["route"]`."""
        answer = self._session.post(work["route"], json=work["json"])
        if answer.status_code != 200:
            raise RuntimeError(f"{work['route']}: HTTP {answer.status_code} {answer.text[:200]}")
        return answer.json()

    def close(self) -> None:
        """End it as a service is ended."""
        if hasattr(self, "_session"):  # it had begun
            self._session.close()
        super().close()


def cpu_seconds(process: psutil.Process) -> float:
    """What a process has computed until now, in the system's ticks of 10 ms."""
    times = process.cpu_times()
    return times.user + times.system


def resident_mb(process: psutil.Process) -> tuple[float, float]:
    """Resident memory, all of it and that beyond the libraries of libtorch."""
    maps = process.memory_maps()
    libraries = sum(one.rss for one in maps if Path(one.path).name.startswith(LIBTORCH))
    return sum(one.rss for one in maps) / 1e6, (sum(one.rss for one in maps) - libraries) / 1e6


def data_uri(image: Path) -> str:
    """An image's bytes as a URL that holds them."""
    kind = "jpeg" if image.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def peer_python(package: str, folder: Path, *others: str) -> Path:
    """The Python of an environment of the peer's own, in which it is installed with NumPy and `others`; made on the first call.

    RuntimeError, one line, where it cannot be installed.
    """
    place = folder / package
    python = place / "bin" / "python"
    if not (place / "whole").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", package, "numpy", *others]
        done = subprocess.run(install, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise RuntimeError(f"cannot be installed: {said[-1][:160] if said else done.returncode}")
        (place / "whole").touch()
    return python


@contextlib.contextmanager
def closing_all(workers: Mapping[str, Worker]) -> Iterator[None]:
    """End all of them after the block, whatever came of it."""
    try:
        yield
    finally:
        for worker in workers.values():
            worker.close()


def start_all(starts: Mapping[str, Callable[[Path], Worker]], workers: dict[str, Worker], work: Path) -> dict[str, str]:
    """Fill `workers`; why some cannot run. InputError where one of ours cannot."""
    left_out: dict[str, str] = {}
    for name, start in progress(starts.items(), desc="start", unit="provider"):
        try:
            workers[name] = start(work / f"{name}.log")
        except (RuntimeError, OSError) as error:
            left_out[name] = str(error)
    if missing := sorted({"cpp", "eager"} & set(left_out)):
        raise InputError("; ".join(f"{name}: {left_out[name]}" for name in missing))
    return left_out
