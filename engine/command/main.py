"""A command's life: what it prints and how it ends.

standard output    one line: a JSON object with the headline numbers
standard error     everything else, the prints of libraries included
exit code          0 done, 2 bad input (one line, no traceback), 130 interrupted; a traceback is a bug of ours
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from engine import processes
from engine.errors import InputError, Interrupted
from engine.files import plain


def run_command(main: Callable[[list[str]], dict | None], argv: list[str] | None = None) -> None:
    """Run a recipe's `main(argv)` under the conventions above; raises SystemExit where the exit code is not 0.

    While it runs, standard output goes to standard error; the dict that it returns is printed by the first process at the end.
    """
    argv = sys.argv[1:] if argv is None else argv
    _set_up_logging()
    asks_for_help = {"-h", "--help", "--help_all"} & set(argv)
    try:
        with contextlib.nullcontext() if asks_for_help else _stdout_to_stderr():
            result = main(argv)
    except InputError as error:
        _end(f"error: {_last_line(error)}", 2)
    except (KeyboardInterrupt, Interrupted) as error:
        _end(_last_line(error) or "interrupted", 130)
    processes.close()
    if result is not None and processes.rank() == 0:
        print(json.dumps(plain(result, digits=6)), flush=True)


def _set_up_logging() -> None:
    """Our log goes to standard error; libraries say less, and show no bar for each file that they load, save or fetch."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    for chatty in ("httpx2", "matplotlib", "PIL", "fsspec", "torch.distributed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)  # it sets its own level when imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported, for transformers too
    if "huggingface_hub" in sys.modules:
        import huggingface_hub.utils

        huggingface_hub.utils.disable_progress_bars()
    if "transformers" in sys.modules:
        import transformers

        transformers.utils.logging.disable_progress_bar()


def _end(message: str, code: int) -> NoReturn:
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
