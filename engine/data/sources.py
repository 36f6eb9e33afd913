"""Where questions are stored: JSON array, JSON lines, Parquet, a `save_to_disk` folder, a folder made by a prepare recipe.

`read_source` gives raw rows, unchecked, and a handle per image that opens it later.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from engine.data.images import decode_image, image_error, open_image
from engine.data.split_names import name_of_split
from engine.errors import InputError
from engine.files import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset

EXPECTED = "a .json array, .jsonl or .parquet file of questions, a save_to_disk folder, or a folder made by a prepare recipe"
COLUMNS = (
    *("image", "problem", "solution", "options", "modality", "question_type", "subset", "question", "answer"),
    *("lesion_id", "image_id", "dx", "diagnosis", "age", "sex", "localization", "bbox", "spatial_description"),  # of skin lesions
)


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

    def read(self) -> tuple[str, bytes]:
        """The file's name and its content as it is."""
        return self.path.name, self.path.read_bytes()


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image in row `row` of a Hugging Face data set that was saved in `folder`."""

    dataset: Any  # gives Arrow tables
    folder: str
    row: int
    written: list[int]

    @property
    def key(self) -> str:
        return f"{self.folder}#{self.row}"

    def stamp(self) -> list[int]:
        return self.written

    def open(self) -> Image.Image:
        name, data = self.read()
        return decode_image(data, name)

    def read(self) -> tuple[str, bytes]:
        """The name of the file that was stored, or else `key`, and its content."""
        cell = self.dataset[self.row]["image"][0].as_py()  # not decoded by the data set, but by us
        if not cell or not cell.get("bytes"):
            raise image_error(self.key, "no image is stored here")
        return cell.get("path") or self.key, cell["bytes"]


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
        if shards := find_shards(path, split):
            return _read_parquet(shards, f"{path}/{split}", path, image_root)
        inside = [path / f"{split}{suffix}" for suffix in (".json", ".jsonl") if (path / f"{split}{suffix}").is_file()]
        if not inside:
            raise InputError(f"{path}: a folder without {split}.json (expected {EXPECTED})")
        path = inside[0]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder (expected {EXPECTED})")
    if path.suffix.lower() == ".parquet":
        return _read_parquet([path], str(path), path.parent, image_root)
    readers = {".json": _read_array, ".jsonl": _read_lines}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unsupported kind of file {path.suffix!r} (expected {EXPECTED})")
    rows = readers[path.suffix.lower()](path)
    if not rows:
        raise InputError(f"{path}: no rows in it (expected {EXPECTED})")
    root = Path(os.path.abspath(image_root or path.parent))
    return Source(str(path), rows, root, name_of_split(Path(os.path.abspath(path))))


def find_shards(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split, where `folder` is a copy of a hub data set."""
    return sorted([*folder.glob(f"{split}-*.parquet"), *folder.glob(f"data/{split}-*.parquet")])


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
    from datasets import DatasetDict, load_from_disk  # imported here: slow, and most data are JSON

    with _damage(path):
        dataset = load_from_disk(str(path))
    if not isinstance(dataset, DatasetDict):
        return dataset_source(dataset, str(path), path, image_root)
    if split not in dataset:
        raise InputError(f"{path}: no split {split!r} (expected one of {', '.join(dataset)})")
    return dataset_source(dataset[split], f"{path}/{split}", path, image_root)


def _read_parquet(files: list[Path], name: str, folder: Path, image_root: str | Path | None) -> Source:
    """Parquet files as one data set; `datasets` keeps an Arrow copy in the cache folder."""
    from datasets import Dataset

    with _damage(name):
        dataset = Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache_folder() / "datasets"))
    return dataset_source(dataset, name, folder, image_root)


@contextmanager
def _damage(name: str | Path) -> Iterator[None]:
    """Inside, every exception is an InputError about `name`: Arrow and JSON readers raise many kinds of them for damaged files."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{name}: damaged data set: {' '.join(str(error).split())[:160]} (expected {EXPECTED})") from None


def dataset_source(dataset: "Dataset", name: str, folder: Path, image_root: str | Path | None) -> Source:
    """A Hugging Face `Dataset` that is called `name`; image names in it start at `image_root`, by default `folder`."""
    from datasets import Image as ImageFeature

    if not len(dataset):
        raise InputError(f"{name}: no rows in it (expected {EXPECTED})")
    texts = dataset.select_columns([column for column in COLUMNS if column in dataset.column_names])
    root, labels = Path(os.path.abspath(image_root or folder)), name_of_split(Path(name) if Path(name).is_file() else folder)
    if not isinstance(dataset.features.get("image"), ImageFeature):
        return Source(name, texts.with_format(None).to_list(), root, labels)
    rows = texts.remove_columns("image").to_list() if len(texts.column_names) > 1 else [{} for _ in range(len(texts))]
    status = [Path(file["filename"]).stat() for file in dataset.cache_files]
    written = [sum(file.st_size for file in status), max(file.st_mtime_ns for file in status)]
    cells = dataset.select_columns("image").with_format("arrow")
    stored = [StoredImage(cells, os.path.abspath(name), row, written) for row in range(len(rows))]
    return Source(name, rows, root, labels, stored)
