"""Where questions are stored: JSON, a table, Parquet, a `save_to_disk` folder, a folder made by a prepare recipe.

`read_source` gives raw rows, unchecked, and a handle per image that opens it later.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from engine.data.formats.columns import our_name
from engine.data.formats.folders import ENDINGS, TABLES, ending, files_of_split
from engine.data.formats.json_rows import read_json_rows
from engine.data.formats.text import read_text, refuse_lfs_pointer
from engine.data.images import image_error, read_image_file
from engine.data.loaders.decoded import decode_once, open_decoded
from engine.data.split_names import name_of_split
from engine.data.tables import open_table
from engine.data.volumes.view import View
from engine.errors import InputError
from engine.files import cache_folder, open_regular, visible_files

if TYPE_CHECKING:
    from datasets import Dataset

EXPECTED = f"a {', '.join(ENDINGS)} file of questions, a save_to_disk folder, or a folder made by a prepare recipe"
TABLE_COLUMNS = "the columns image, question, answer, and options or A, B, ..."
LESION_COLUMNS = ("lesion_id", "image_id", "dx", "diagnosis", "age", "sex", "localization", "bbox", "spatial_description")
MAX_ROWS = 10_000_000  # of a Parquet file, whose size does not say how many rows it holds


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own."""

    path: Path

    @property
    def key(self) -> str:
        return str(self.path)

    def stamp(self) -> list[int]:
        """Size and time of the file: what tells that it changed. OSError or ValueError if it cannot be there."""
        return View.of(self.path).stamp()

    def open(self) -> Image.Image:
        return open_decoded(self.path)

    def read(self) -> tuple[str, bytes]:
        """The file's name and its content as it is; a slice of a volume as a PNG."""
        view = View.of(self.path)
        if not view.is_of_volume:
            return self.path.name, read_image_file(self.path)
        buffer = io.BytesIO()
        self.open().save(buffer, "PNG")
        return f"{self.path.name}.png", buffer.getvalue()


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image in row `row` of a Hugging Face data set that was saved in `folder`; of a list of them the one at `position`."""

    dataset: Any  # gives Arrow tables of one column
    folder: str
    row: int
    written: list[int]
    position: int | None = None

    @property
    def key(self) -> str:
        return f"{self.folder}#{self.row}" + ("" if self.position is None else f".{self.position}")

    def stamp(self) -> list[int]:
        return self.written

    def open(self) -> Image.Image:
        name, data = self.read()
        return decode_once(data, name)

    def read(self) -> tuple[str, bytes]:
        """The name of the file that was stored, or else `key`, and its content."""
        cell = self.dataset[self.row][0][0].as_py()  # not decoded by the data set, but by us
        cell = cell if self.position is None else cell[self.position]
        cell = {"bytes": cell} if isinstance(cell, bytes) else cell
        if not cell or not cell.get("bytes"):
            raise image_error(self.key, "no image is stored here")
        return cell.get("path") or self.key, cell["bytes"]


@dataclass(frozen=True)
class Source:
    """Raw rows of one file or folder. A row is a dict, or what stood in its place: a JSON value, a broken line (str), a BadRow."""

    name: str
    rows: list
    root: Path
    labels: dict[str, str]
    stored: list[list[StoredImage]] | None = None  # those of each row, where the images are in the data set itself
    lines: list[int] | None = None  # where each row begins, in a table

    def line_of(self, row: int) -> int | None:
        """The line where a row begins, from 1; None where the file is no table."""
        return self.lines[row] if self.lines else None


def read_source(path: str | Path, split: str, image_root: str | Path | None = None) -> Source:
    """The rows at `path`; relative image names start at `image_root`, by default the folder of the file."""
    path = Path(path)
    if path.is_dir():
        if is_saved(path):
            return _read_saved(path, split, image_root)
        files = files_of_split(path, split)
        if not files:
            others = [found.name for found in visible_files(path, "*") if ending(found) in ENDINGS]
            held = f"; it holds {others[0]}: name the file that is meant" if others else ""
            raise InputError(f"{path}: a folder without {split}.json or the like (expected {EXPECTED}{held})")
        if ending(files[0]) == ".parquet":
            return _read_parquet(files, f"{path}/{split}", path, image_root)
        path = files[0]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder (expected {EXPECTED})")
    if ending(path) == ".parquet":
        return _read_parquet([path], str(path), path.parent, image_root)
    if ending(path) not in ENDINGS:
        raise InputError(f"{path}: unsupported kind of file {path.suffix!r} (expected {EXPECTED})")
    lines = None
    if ending(path) in TABLES:
        lines, rows = read_table_rows(path)
    else:
        rows = read_json_rows(path, EXPECTED)
    if not rows:
        raise InputError(f"{path}: no rows in it (expected {EXPECTED})")
    root = Path(os.path.abspath(image_root or path.parent))
    return Source(str(path), rows, root, name_of_split(Path(os.path.abspath(path))), lines=lines)


def is_saved(path: Path) -> bool:
    """Whether `path` is a folder that `datasets` saved."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def saved_splits(path: Path) -> list[str]:
    """The splits of a folder that `datasets` saved; none where it holds a single set of rows."""
    index = path / "dataset_dict.json"
    if not index.is_file():
        return []
    text = read_text(index, EXPECTED)
    with _damage(index):
        return [str(split) for split in json.loads(text)["splits"]]


def read_table_rows(path: Path) -> tuple[list[int], list]:
    """(lines where the rows begin, the rows) of a table of questions."""
    header, rows = open_table(path, f"a table with {TABLE_COLUMNS}")
    ours = {our_name(name) for name in header}
    for needed in ({"image"}, {"question", "problem"}, {"answer", "solution"}):
        if not ours & needed:
            columns = f"expected {TABLE_COLUMNS}; its header has {', '.join(header)[:200] or 'nothing'}"
            raise InputError(f"{path}: no column {' or '.join(sorted(needed))} ({columns})")
    lines, table = [], []
    for _, line, cells in rows:
        lines.append(line)
        table.append({name: cell.strip() for name, cell in cells.items()} if isinstance(cells, dict) else cells)
    return lines, table


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
    """Parquet files as one data set, by an Arrow copy in the cache folder."""
    from engine.data.formats.parquet import arrow_copy  # imported here, as above

    for file in files:
        _refuse_what_is_no_parquet_file(file)
    with _damage(name):
        dataset = arrow_copy(files, cache_folder() / "arrow")
    return dataset_source(dataset, name, folder, image_root)


def _refuse_what_is_no_parquet_file(path: Path) -> None:
    """InputError for pipes, devices and pointers to files, of which the reader of Parquet would tell nothing, or wait."""
    try:
        with open_regular(path) as file:
            refuse_lfs_pointer(path, file.read(64))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


@contextmanager
def _damage(name: str | Path) -> Iterator[None]:
    """Inside, every exception is an InputError about `name`: Arrow and JSON readers raise many kinds of them for damaged files."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{name}: damaged data set: {' '.join(str(error).split())[:160]} (expected {EXPECTED})") from None


def dataset_source(dataset: "Dataset", name: str, folder: Path, image_root: str | Path | None) -> Source:
    """A Hugging Face `Dataset` that is called `name`; image names in it start at `image_root`, by default `folder`."""
    if not len(dataset):
        raise InputError(f"{name}: no rows in it (expected {EXPECTED})")
    if len(dataset) > MAX_ROWS:
        raise InputError(f"{name}: {len(dataset):,} rows (expected at most {MAX_ROWS:,})")
    named = {column: our_name(column) for column in dataset.column_names}
    image = next((column for column, ours in named.items() if ours == "image" and _holds_images(dataset.features[column])), None)
    kept = [column for column, ours in named.items() if column != image and (ours or column in LESION_COLUMNS)]
    rows = dataset.select_columns(kept).with_format(None).to_list() if kept else [{} for _ in range(len(dataset))]
    root, labels = Path(os.path.abspath(image_root or folder)), name_of_split(Path(name) if Path(name).is_file() else folder)
    if image is None:
        return Source(name, rows, root, labels)
    status = [Path(file["filename"]).stat() for file in dataset.cache_files]
    written = [sum(file.st_size for file in status), max(file.st_mtime_ns for file in status)]
    cells = dataset.select_columns(image).with_format("arrow")
    place = os.path.abspath(name)
    stored = [
        [StoredImage(cells, place, row, written, position) for position in ([None] if count is None else range(count))]
        for row, count in enumerate(_images_per_row(dataset, image))
    ]
    return Source(name, rows, root, labels, stored)


def _holds_images(feature: Any) -> bool:
    """Whether a column's cells are images: Hugging Face's, `{bytes, path}` or bytes without its word for it, or lists of these."""
    from datasets import Image as ImageFeature
    from datasets import LargeList, List, Value

    if isinstance(feature, (List, LargeList)):
        return _holds_images(feature.feature)
    return (
        isinstance(feature, ImageFeature)
        or isinstance(feature, dict)
        and "bytes" in feature
        or isinstance(feature, Value)
        and feature.dtype in ("binary", "large_binary")
    )


def _images_per_row(dataset: "Dataset", column: str) -> list[int | None]:
    """How many images the lists of a column hold; None for each row where the cells are no lists. No image is read."""
    cells = dataset.data.column(column)
    if not str(cells.type).startswith(("list", "large_list")):
        return [None] * len(cells)
    return [count or 0 for chunk in cells.chunks for count in chunk.value_lengths().to_pylist()]
