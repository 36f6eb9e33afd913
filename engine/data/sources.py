"""Where questions are stored: a JSON array, JSON lines, a `save_to_disk` folder, a folder made by `recipes.medr1_prepare`.

`read_source` gives raw rows, unchecked, and a handle per image that opens it later.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from engine.data.images import decode_image, image_error, open_image
from engine.data.split_names import name_of_split
from engine.errors import InputError

EXPECTED = "a .json array or .jsonl file of questions, a save_to_disk folder, or a folder made by recipes.medr1_prepare"
COLUMNS = ("image", "problem", "solution", "options", "modality", "question_type", "subset")


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own."""

    path: Path

    @property
    def key(self) -> str:
        return str(self.path)

    def stamp(self) -> list[int]:
        """Size and time of the file: what tells that it changed. OSError or ValueError if it cannot be there."""
        status = self.path.stat()
        return [status.st_size, status.st_mtime_ns]

    def open(self) -> Image.Image:
        return open_image(self.path)


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image in row `row` of a Hugging Face data set that was saved in `folder`."""

    dataset: Any
    folder: str
    row: int
    written: list[int]

    @property
    def key(self) -> str:
        return f"{self.folder}#{self.row}"

    def stamp(self) -> list[int]:
        return self.written

    def open(self) -> Image.Image:
        cell = self.dataset[self.row]["image"][0].as_py()  # the data set gives Arrow tables: no decoding but ours
        if not cell or not cell.get("bytes"):
            raise image_error(self.key, "no image is stored here")
        return decode_image(cell["bytes"], cell.get("path") or self.key)


@dataclass(frozen=True)
class Source:
    """Raw rows of one file or folder. A row is a dict, or the JSON value or broken line (str) that stood in its place."""

    name: str
    rows: list
    root: Path
    labels: dict[str, str]
    stored: list[StoredImage] | None = None  # one a row, where the images are in the data set itself


def read_source(path: str | Path, split: str, image_root: str | Path | None = None) -> Source:
    """The rows at `path`; relative image names start at `image_root`, by default the folder of the file."""
    path = Path(path)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _read_saved(path, split, image_root)
        inside = [path / f"{split}{suffix}" for suffix in (".json", ".jsonl") if (path / f"{split}{suffix}").is_file()]
        if not inside:
            raise InputError(f"{path}: a folder without {split}.json (expected {EXPECTED})")
        path = inside[0]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder (expected {EXPECTED})")
    readers = {".json": _read_array, ".jsonl": _read_lines}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unsupported kind of file {path.suffix!r} (expected {EXPECTED})")
    rows = readers[path.suffix.lower()](path)
    if not rows:
        raise InputError(f"{path}: no rows in it (expected {EXPECTED})")
    root = Path(os.path.abspath(image_root or path.parent))
    return Source(str(path), rows, root, name_of_split(Path(os.path.abspath(path))))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text (expected {EXPECTED})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _read_array(path: Path) -> list:
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty (expected {EXPECTED})")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error} (expected {EXPECTED})") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: a JSON {type(rows).__name__}, not an array of rows (expected {EXPECTED})")
    return rows


def _read_lines(path: Path) -> list:
    rows = []
    for line in _read_text(path).split("\n"):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                rows.append(line)
    if rows and all(isinstance(row, str) for row in rows):
        raise InputError(f"{path}: no line of it is JSON (expected {EXPECTED})")
    return rows


def _read_saved(path: Path, split: str, image_root: str | Path | None) -> Source:
    """A `datasets` folder; the split of that name where it holds several."""
    from datasets import DatasetDict, load_from_disk
    from datasets import Image as ImageFeature  # imported here: slow, and most data are JSON

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # Arrow and JSON readers meet damaged files with many kinds of exception
        raise InputError(f"{path}: damaged data set: {' '.join(str(error).split())[:160]} (expected {EXPECTED})") from None
    name, files = str(path), path
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise InputError(f"{path}: no split {split!r} (expected one of {', '.join(dataset)})")
        dataset, name, files = dataset[split], f"{path}/{split}", path / split
    if not len(dataset):
        raise InputError(f"{name}: no rows in it (expected {EXPECTED})")
    texts = dataset.select_columns([column for column in COLUMNS if column in dataset.column_names])
    root, labels = Path(os.path.abspath(image_root or path)), name_of_split(path)
    if not isinstance(dataset.features.get("image"), ImageFeature):
        return Source(name, texts.with_format(None).to_list(), root, labels)
    rows = texts.remove_columns("image").to_list() if len(texts.column_names) > 1 else [{} for _ in range(len(texts))]
    status = [file.stat() for file in files.glob("*.arrow")]
    written = [sum(file.st_size for file in status), max(file.st_mtime_ns for file in status)]
    cells = dataset.select_columns("image").with_format("arrow")
    stored = [StoredImage(cells, os.path.abspath(files), row, written) for row in range(len(rows))]
    return Source(name, rows, root, labels, stored)
