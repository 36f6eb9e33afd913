"""How a command ends other than well: the user's errors (one line, no traceback, exit code 2), and a stop after saving."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input: a file, row, flag or checkpoint that cannot be used.

    The message is one line that names what is wrong, where, and what was expected, e.g.
    `train.json: row 17: answer 'E' is not among the options A, B, C, D`.
    """


class Interrupted(Exception):
    """A signal ended the run after its state was saved; the command exits with 130."""


@contextmanager
def input_errors(what: str) -> Iterator[None]:
    """Inside, a ValueError or OSError becomes an InputError of one line that begins with `what`: the user can mend it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(f"{what}: {str(error).strip().splitlines()[0]}") from error
