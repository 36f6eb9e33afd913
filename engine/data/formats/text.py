"""A text file that a user names, as a string: bounded, inflated where it is gzip, UTF-8 or (with its mark) UTF-16."""

import codecs
import gzip
import io
import zlib
from pathlib import Path

from engine.errors import InputError
from engine.files import read_bounded

MAX_BYTES = 2**28  # of a file of questions, inflated: three times the largest published one
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_text(path: str | Path, expected: str) -> str:
    """The file's text; InputError, which says what was `expected`, if it cannot be had, is no text or larger than MAX_BYTES."""
    try:
        data = read_bounded(path, MAX_BYTES)
        if data[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: inflates to more than {MAX_BYTES:,} bytes (expected several smaller files, or Parquet)")
    refuse_lfs_pointer(path, data)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: not UTF-8 text in line {line} (expected {expected})") from None


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, as JSON can name one: no file and no tokenizer takes it."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def refuse_lfs_pointer(path: str | Path, data: bytes) -> None:
    """InputError if the data are what Git LFS leaves in place of a file that was not fetched."""
    if data.startswith(LFS_POINTER):
        raise InputError(f"{path}: a Git LFS pointer, not the file itself (`git lfs pull` fetches it)")
