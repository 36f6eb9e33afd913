"""A command's life: its run folder, what it prints and how it ends.

runs/<recipe>/<YYYYmmdd-HHMMSS>/    config.json, metrics.jsonl (one line a step), checkpoints, curves.png, report.html
standard output                     one line: a JSON object with the headline numbers
standard error                      everything else, the prints of libraries included
exit code                           0 done, 2 bad input (one line, no traceback), 130 interrupted; a traceback is a bug of ours
"""

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import torch
import transformers

from engine import processes
from engine.errors import InputError, Interrupted
from engine.files import write_whole


def describe_device() -> str:
    """What this process computes on, e.g. `cpu (2 threads)` or `cuda:0 NVIDIA H200 (139 GiB)`."""
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    index = torch.cuda.current_device()
    device = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {device.name} ({device.total_memory / 2**30:.0f} GiB)"


def local_device() -> torch.device:
    """The device of this process: its own GPU among those of `torchrun`, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


class RunFolder:
    """The folder of one run. Every process knows `path`; only the first one writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.writes = processes.rank() == 0

    def write_json(self, name: str, data) -> None:
        """Write `data` whole as `name`; what JSON has no word for becomes its `str`, and non-finite numbers null."""
        if self.writes:
            write_whole(self.path / name, json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")

    def append_metrics(self, row: dict) -> None:
        """Add one line to metrics.jsonl; it is on its way to the disk when this returns."""
        if self.writes:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row)) + "\n")

    def read_metrics(self) -> list[dict]:
        """The rows of metrics.jsonl in order. A last line cut short by a kill is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows of `step` and later: a resumed run, whose first step this is, writes them again."""
        if self.writes:
            kept = [json.dumps(row) + "\n" for row in self.read_metrics() if row.get("step", 0) < step]
            write_whole(self.path / "metrics.jsonl", "".join(kept))


def open_run(recipe: str, output_dir: str | Path | None = None) -> RunFolder:
    """Make the run folder: `output_dir`, or else a new `runs/<recipe>/<YYYYmmdd-HHMMSS>`, the same one in every process."""
    processes.join()
    path = Path(output_dir or processes.first_rank_says(_new_folder, Path("runs") / recipe))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be the output folder ({error.strerror})") from None
    return RunFolder(path)


def _new_folder(parent: Path) -> str:
    while True:
        path = parent / time.strftime("%Y%m%d-%H%M%S")
        try:
            path.mkdir(parents=True)
            return str(path)
        except FileExistsError:  # another run started within this second
            time.sleep(0.2)


def run_command(main: Callable[[list[str]], dict | None], argv: list[str] | None = None) -> None:
    """Run a recipe's `main(argv)` under the conventions above; ends the process where its exit code is not 0.

    While it runs, standard output leads to standard error; the dict it returns is printed at last by the first process.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    for chatty in ("httpx2", "matplotlib", "PIL", "fsspec", "torch.distributed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)  # it sets its own level when imported
    transformers.utils.logging.disable_progress_bar()  # a bar for each file loaded or saved
    asks_for_help = {"-h", "--help"} & set(argv)
    try:
        with _short_usage_errors(), contextlib.nullcontext() if asks_for_help else _stdout_to_stderr():
            result = main(argv)
    except InputError as error:
        _end(f"error: {_last_line(error)}", 2)
    except (KeyboardInterrupt, Interrupted) as error:
        _end(_last_line(error) or "interrupted", 130)
    processes.leave()
    if result is not None and processes.rank() == 0:
        print(json.dumps(plain(result, digits=6)), flush=True)


def _end(message: str, code: int):
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _last_line(error: BaseException) -> str:
    """The message itself, also where a data loader's worker wrapped it into the text of a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ") if lines else ""


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Inside, whatever is printed goes to standard error, from C++ too (gloo greets its peers on descriptor 1)."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _short_usage_errors() -> Iterator[None]:
    """Inside, argparse's complaints are InputErrors: one line, not that line below two hundred flags of usage."""

    def error(parser: argparse.ArgumentParser, message: str):
        raise InputError(f"{message} (--help lists the flags)")

    original = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error
    try:
        yield
    finally:
        argparse.ArgumentParser.error = original


def plain(value, digits: int | None = None):
    """`value` in JSON's own types: tensors and NumPy numbers as numbers, non-finite ones as None, the rest by `str`.

    With `digits`, floats keep that many significant digits.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item, digits) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), digits)
    if isinstance(value, Enum):
        return plain(value.value, digits)
    if isinstance(value, float):
        return (float(f"{value:.{digits}g}") if digits else value) if math.isfinite(value) else None
    return value if value is None or type(value) in (bool, int, str) else str(value)
