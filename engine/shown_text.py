"""Text from elsewhere (a server, a file, a model, a file's name), as it may be shown: on a terminal, in a page, in a table.

A terminal obeys control characters, a reader is misled by marks that turn the direction of writing, a spreadsheet computes what
begins like a formula, and an address may hold a password.
"""

import re
from typing import Any
from urllib.parse import quote

_BREAKS = "\n\t"
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_USER = re.compile(r"(?<=://)[^\s/'\"<>]*@(?=[^\s/])")
_SECRET = re.compile(
    r"(?i)(?<=[?&;])([\w.-]*(?:key|token|secret|passw(?:or)?d|signature|credential|sig|auth)[\w.-]*=)[^&;#\s'\"<>)]+"
)
_FORMULA = re.compile(r"[=+\-@\t\r]|\s+[=+\-@]")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?%?")


def printable(text: str, *, lines: bool = False) -> str:
    """The text with control characters, marks of direction and lone surrogates written out, as \\x1b; `lines`: line breaks stay."""

    def written_out(match: re.Match[str]) -> str:
        character = match[0]
        return character if lines and character in _BREAKS else character.encode("unicode_escape").decode("ascii")

    return _CONTROLS.sub(written_out, text)


def without_secrets(text: str, *secrets: str) -> str:
    """The text without the given ones, also percent-encoded, and without user, password and keys of the web addresses in it."""
    for secret in secrets:
        for spelling in {secret, quote(secret, safe="")} - {""}:
            text = text.replace(spelling, "***")
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def spreadsheet_cell(value: Any) -> Any:
    """What a CSV may hold for `value`: a text that a spreadsheet would compute has an apostrophe before it."""
    live = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return f"'{value}" if live else value


def from_spreadsheet_cell(text: str) -> str:
    """What `spreadsheet_cell` was given."""
    return text[1:] if text.startswith("'") and spreadsheet_cell(text[1:]) == text else text
