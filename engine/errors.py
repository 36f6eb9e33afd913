"""Errors that are the user's to mend: shown as one line, without a traceback, with exit code 2."""

from contextlib import contextmanager


class InputError(Exception):
    """Bad input: a file, row, flag or checkpoint that cannot be used.

    The message is one line that names what is wrong, where, and what was expected, e.g.
    `train.json: row 17: answer 'E' is not among the options A, B, C, D`.
    """


class Interrupted(Exception):
    """A signal ended the run after its state was saved; the command exits with 130."""


@contextmanager
def input_errors(what: str):
    """Inside, a ValueError or OSError is the user's: it becomes an InputError of one line that begins with `what`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(f"{what}: {str(error).strip().splitlines()[0]}") from error
