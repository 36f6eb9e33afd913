"""Parquet files as one Hugging Face data set, in little memory.

`Dataset.from_parquet` takes a whole group of rows at a time, and pandas writes a file as one group, so that its rows lie in memory
three times. Here a hundred rows at a time are read and written to an Arrow file, which is then mapped into memory and not read.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from datasets import Dataset, Features
from datasets.table import table_cast
from pyarrow.parquet import ParquetFile, read_schema

from engine.files import locked_folder

ROWS = 100  # read at a time, since a row may hold an image of many megabytes
LAYOUT = 1  # of the copies; another number, and all are made anew


def arrow_copy(files: Sequence[Path], folder: Path) -> Dataset:
    """The rows of the files, one after the other, with the columns of the first; the copy lies in `folder` until a file changes.

    Raises what Arrow and `datasets` raise about files that are damaged or do not go together.
    """
    stamps = [[os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    copy = folder / f"{hashlib.sha256(json.dumps([LAYOUT, *stamps]).encode()).hexdigest()[:32]}.arrow"
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, wait=True):  # the others of a run wait for the first one's copy
        if not copy.exists():
            _write(files, copy)
    return Dataset.from_file(str(copy))


def _write(files: Sequence[Path], copy: Path) -> None:
    """Under another name until it is whole."""
    schema = Features.from_arrow_schema(read_schema(files[0])).arrow_schema
    part = copy.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with pyarrow.OSFile(str(part), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            for file in files:
                with ParquetFile(file) as source:
                    for batch in source.iter_batches(ROWS, use_threads=False):
                        writer.write_table(table_cast(pyarrow.Table.from_batches([batch]), schema))
        os.replace(part, copy)
    finally:
        part.unlink(missing_ok=True)
