"""A command's life: what it prints and how it ends.

standard output    one line: a JSON object with the headline numbers
standard error     everything else, the prints of libraries included
exit code          0 done, 2 bad input (one line, no traceback), 130 interrupted; a traceback is a bug of ours

Of processes that `torchrun` started together, the first that fails says so, and all end with its code (`engine/peers.py`).
"""

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from engine import peers, processes
from engine.command.streams import Terminal, occupy_streams, write_output
from engine.errors import InputError, Interrupted
from engine.files import plain
from engine.shown_text import printable, without_secrets

LONGEST_LINE = 2000  # characters of the error that a command ends with
# What the machine refuses: a user can mend it.
REFUSALS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP EIO".split()
    if hasattr(errno, name)
}


def run_command(main: Callable[[list[str]], dict | None], argv: list[str] | None = None) -> None:
    """Run a recipe's `main(argv)` under the conventions above; raises SystemExit where the exit code is not 0.

    While it runs, standard output goes to standard error; the dict that it returns is printed by the first process at the end, when
    all else is written. Where it cannot be printed it stands in the error's line. Of several processes started together, one that
    fails ends without SystemExit.
    """
    argv = sys.argv[1:] if argv is None else argv
    occupy_streams()
    if not isinstance(sys.stderr, Terminal):
        sys.stderr = Terminal(sys.stderr)  # type: ignore[assignment]
    interrupts = _Interrupts()
    try:
        _run(main, argv)
    except InputError as error:
        _end(f"error: {_message(error)}", 2)
    except (KeyboardInterrupt, Interrupted) as error:
        _end(_message(error) or "interrupted", 130)
    except Exception as error:
        if interrupts.received:  # a library made another exception of it
            _end("interrupted", 130)
        if isinstance(error, OSError) and error.errno in REFUSALS:
            _end(f"error: {error.filename or 'a file'}: {error.strerror}", 2)
        if peers.is_loss(error):
            _end("error: another process of this run has ended (was it killed?)", 2)
        if peers.are_several():
            if (code := peers.failed_before(1)) is None:
                traceback.print_exc()
            peers.leave(code or 1)
        raise


def _run(main: Callable[[list[str]], dict | None], argv: list[str]) -> None:
    _set_up_logging()
    asks_for_help = {"-h", "--help", "--help_all"} & set(argv)
    if not asks_for_help:
        processes.check_environment()
        peers.watch()  # from here on where `torchrun` holds the store: settings, too, wait for the others
    try:
        with contextlib.nullcontext() if asks_for_help else _stdout_to_stderr():
            result = main(argv)
    except SystemExit:  # after help
        _check_output(write_output())
        raise
    peers.close()
    if result is not None and processes.rank() == 0:
        headline = json.dumps(plain(result, digits=6)).replace("\x7f", "\\u007f")
        _check_output(write_output(headline), f"; the results: {headline}")


def _check_output(error: OSError | None, rest: str = "") -> None:
    if error is not None:
        _end(f"error: standard output cannot be written ({error.strerror}){rest}", 2)


class _Interrupts:
    """Ctrl-C and SIGTERM are a KeyboardInterrupt; remembered, since some libraries turn that into another exception."""

    def __init__(self) -> None:
        self.received, self.process = False, os.getpid()
        with contextlib.suppress(ValueError):  # in a thread
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker that was forked ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True
        raise KeyboardInterrupt


class _OneForm(logging.Formatter):
    """The message alone, without what a terminal would obey or what should stay secret."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(printable(super().format(record), lines=True))


def _set_up_logging() -> None:
    """Our log goes to standard error; libraries say less, show no bar a file that they load, save or fetch, and report nothing."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneForm("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    for chatty in ("httpx2", "matplotlib", "PIL", "fsspec", "torch.distributed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for reader in ("PIL", "pydicom"):  # what they doubt in a file, with words of it; what cannot be read is an error of ours
        warnings.filterwarnings("ignore", module=rf"{reader}\.")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)  # it sets its own level when imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported, for transformers too
    telemetry = os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "huggingface_hub" in sys.modules:
        import huggingface_hub.utils

        huggingface_hub.utils.disable_progress_bars()
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = telemetry == "1"
    if "transformers" in sys.modules:
        import transformers

        transformers.utils.logging.disable_progress_bar()


def _end(message: str, code: int) -> NoReturn:
    of_first = peers.failed_before(code)
    if of_first is None:
        print(without_secrets(printable(message)), file=sys.stderr, flush=True)
    if peers.are_several():
        peers.leave(code if of_first is None else of_first)
    raise SystemExit(code) from None


def _message(error: BaseException) -> str:
    """The message itself, also where a data loader's worker wrapped it into the text of a traceback."""
    text = str(error).strip()
    text = text.rpartition(f"\n{type(error).__module__}.{type(error).__name__}: ")[2]
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}..."


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
