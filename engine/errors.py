"""Errors that are the user's to mend: shown as one line, without a traceback, with exit code 2."""


class InputError(Exception):
    """Bad input: a file, row, flag or checkpoint that cannot be used.

    The message is one line that names what is wrong, where, and what was expected, e.g.
    `train.json: row 17: answer 'E' is not among the options A, B, C, D`.
    """


class Interrupted(Exception):
    """A signal ended the run after its state was saved; the command exits with 130."""
