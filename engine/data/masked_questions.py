"""Questions about an image and the mask that answers them, in PRS-Med's published CSV format (arXiv:2505.11872).

    ROOT/annotations/<set>.csv       image_path,image_name,question,answer,position,split
    ROOT/<set>/<split>_images/FILE   ROOT/<set>/<split>_masks/FILE      split: train, val or test

`image_path` starts at ROOT and names the mask (the six PRS-Med sets) or the image (`our-dataset`'s two); the other file has the
same name in the other folder, whatever its ending, and ISIC's `X.jpg` has the mask `X_Segmentation.png`. `[i]` gives

    image: PIL RGB       mask: PIL L of the image's size, 0 or 255        question, answer, position, split: str, as in the file
    image_id: str        dataset: str, the set's folder                   label: the published class 0-5, None for other sets
    row: int, counted from 0 without the header                           source: str, the file it stands in

What becomes of a bad row: see `engine.data.rows`.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from engine.data.formats.folders import TABLES
from engine.data.image_check import find_bad_images
from engine.data.images import EXPECTED, ImageError, image_error, open_image
from engine.data.rows import BadRow, BadRows, Rows, evenly_spread
from engine.data.tables import read_csv
from engine.errors import InputError
from engine.files import visible_files

LABELS = {
    "brain_tumors_ct_scan": 0,
    "breast_tumors_ct_scan": 1,
    "lung_CT": 2,
    "lung_Xray": 3,
    "skin_rgbimage": 4,
    "polyp_endoscopy": 5,
}
FAMILIES = {"PRS-Med": tuple(LABELS), "our-dataset": ("head_and_neck", "prostate")}
COLUMNS = ("image_path", "image_name", "question", "answer", "position", "split")
FILLED = ("image_path", "question", "answer", "position", "split")
SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm")
MASK_SUFFIX = "_Segmentation"  # of ISIC's masks
SHAPE_TOLERANCE = 0.02  # a mask may have another size than its image; its height / width differs by at most this fraction
ListFolder = Callable[[Path], frozenset[str]]  # the names in a folder
LAYOUT = "<set>/<split>_masks/<file> or <set>/<split>_images/<file>"


@dataclass(frozen=True)
class ImageAndMask:
    """Two files that belong together."""

    image: Path
    mask: Path

    @property
    def key(self) -> str:
        return f"{self.image}|{self.mask}"

    def stamp(self) -> list[int]:
        """Sizes and times of the files: what tells that one changed."""
        return [number for path in (self.image, self.mask) for number in (path.stat().st_size, path.stat().st_mtime_ns)]

    def open(self) -> tuple[Image.Image, Image.Image]:
        """(RGB image, mask of its size). ImageError, whose reason says which file, if they cannot be used."""
        opened = {}
        for kind, path in (("image", self.image), ("mask", self.mask)):
            try:
                opened[kind] = open_image(path)
            except ImageError as error:
                raise image_error(str(path), f"{kind} {path.name!r}: {error.reason}") from None
        image, mask = opened["image"], opened["mask"]
        if abs(mask.height * image.width / (mask.width * image.height) - 1) > SHAPE_TOLERANCE:
            sizes = f"mask {self.mask.name!r} is {mask.width} x {mask.height}, its image {image.width} x {image.height}"
            raise image_error(str(self.mask), sizes)
        return image, clean_mask(mask, image.size)


def clean_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask as 0 and 255, at `size`: pixels above 127 belong to it; where none is so bright (labels 1, 2, ...), all but 0."""
    pixels = np.asarray(mask.convert("L"))
    binary = Image.fromarray(((pixels > (127 if pixels.max() > 127 else 0)) * 255).astype(np.uint8))
    return binary if binary.size == size else binary.resize(size, Image.Resampling.NEAREST)


def read_mask(path: str | Path, image: Image.Image) -> np.ndarray:
    """[H, W] bool: the mask file that belongs to an image; InputError if it cannot be read or is of another size."""
    mask = open_image(path)
    if mask.size != image.size:
        raise InputError(f"{path}: the mask is {mask.width} x {mask.height}, the image {image.width} x {image.height}")
    return np.asarray(clean_mask(mask, image.size)) > 0


class MaskedQuestions(Rows[ImageAndMask]):
    """Checked rows, each with an image and its mask."""

    def open(self, handle: ImageAndMask) -> dict[str, Any]:
        image, mask = handle.open()
        return {"image": image, "mask": mask}


def load_masked_questions(
    data_root: str | Path,
    ann_paths: str | Sequence[str | Path] | None = None,
    *,
    split: str | None = "train",
    on_bad_row: str = "error",
    limit: int | None = None,
) -> MaskedQuestions:
    """The rows of `split` (None: of all splits) in the CSV files `ann_paths`, one file after the other.

    `ann_paths` is a list or comma-separated, each from here or from `data_root`; by default all of ROOT/annotations. `limit` takes
    only so many rows of the split, evenly spread, before any are skipped. InputError for a bad row, and where no row is left.
    """
    bad = BadRows(on_bad_row)
    if split not in (*SPLITS, None):
        raise InputError(f"split {split!r} (expected one of {', '.join(SPLITS)})")
    root = _existing_folder(data_root)
    asked: list[tuple[Path, int, int, dict[str, str] | BadRow]] = []  # rows of the split, and those that are none
    seen: Counter[str] = Counter()  # rows of each split
    for path in find_annotations(root, ann_paths):
        for index, line, cells in read_csv(path, COLUMNS, FILLED):
            filled = _filled(cells)
            if isinstance(filled, dict):
                seen[filled["split"]] += 1
            if isinstance(filled, BadRow) or split in (None, filled["split"]):
                asked.append((path, index, line, filled))
    rows: list[tuple[dict, ImageAndMask]] = []
    list_folder = cache(_list_folder)  # many rows ask about few folders
    for path, index, line, cells in (asked[i] for i in evenly_spread(len(asked), limit)):
        try:
            record, pair = _check_row(cells, root, path, list_folder)
            rows.append(({**record, "row": index, "source": str(path)}, pair))
        except BadRow as error:
            bad.add(path, index, error, line)
    rows = _check_files(rows, bad, root)
    skipped = bad.lines()
    if skipped and not rows:
        raise InputError(f"all {len(skipped)} rows are bad; the first: {skipped[0]}")
    if not rows:
        found = ", ".join(f"{count} of {name}" for name, count in seen.items()) or "none at all"
        raise InputError(f"{root}: no rows of the split {split!r} (the files have {found})")
    return MaskedQuestions([record for record, _ in rows], [pair for _, pair in rows], skipped)


def check_data_root(data_root: str | Path, ann_paths: str | Sequence[str | Path] | None = None) -> dict:
    """What a data root holds and lacks.

    {"sets": {name: {split: number of usable rows}}, "missing_sets": published ones that are not there although others of their
    family are, "missing_files": [...], "bad_rows": [one line each]}
    """
    rows = load_masked_questions(data_root, ann_paths, split=None, on_bad_row="skip")
    sets: dict[str, Counter] = {}
    for record in rows.records:
        sets.setdefault(record["dataset"], Counter())[record["split"]] += 1
    families = [names for names in FAMILIES.values() if set(names) & set(sets)]
    return {
        "sets": {name: dict(counts) for name, counts in sets.items()},
        "missing_sets": [name for names in families for name in names if name not in sets],
        "missing_files": sorted({line.missing_image for line in rows.skipped if line.missing_image}),
        "bad_rows": rows.skipped,
    }


def find_annotations(root: Path, ann_paths: str | Sequence[str | Path] | None) -> list[Path]:
    """The CSV files meant; a folder stands for those in it."""
    given = ann_paths.split(",") if isinstance(ann_paths, str) else [ann_paths] if isinstance(ann_paths, Path) else ann_paths
    names = [str(name).strip() for name in given or () if str(name).strip()]
    found = []
    for name in names or [str(root / "annotations")]:
        path = next((path for path in (Path(name), root / name) if path.exists()), None)
        if path is None:
            raise InputError(f"{name}: no such file (expected an annotation CSV, from here or from {root})")
        inside = [file for file in visible_files(path, "*") if file.suffix.lower() in TABLES] if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: no CSV file in it (expected the columns {', '.join(COLUMNS)})")
        found += inside
    return list(dict.fromkeys(found))


def _existing_folder(data_root: str | Path) -> Path:
    if not Path(data_root).is_dir():
        raise InputError(f"{data_root}: no such folder (expected a data root with {LAYOUT} and annotations/<set>.csv)")
    return Path(os.path.abspath(data_root))


def _filled(cells: dict[str, str] | BadRow) -> dict[str, str] | BadRow:
    """The cells of a row without white space around them; BadRow if some are missing or the split is none of SPLITS."""
    if isinstance(cells, BadRow):
        return cells
    filled = {name: cells[name].strip() for name in FILLED}
    for name, text in filled.items():
        if not text:
            return BadRow(f"empty {name}", f"{', '.join(FILLED)} to be filled")
    if filled["split"] not in SPLITS:
        return BadRow(f"split {cells['split'][:40]!r}", f"one of {', '.join(SPLITS)}")
    return filled


def _check_row(cells: dict[str, str] | BadRow, root: Path, path: Path, list_folder: ListFolder) -> tuple[dict, ImageAndMask]:
    """Filled cells -> (record, its files); BadRow if the files are not there."""
    if isinstance(cells, BadRow):
        raise cells
    pair, dataset = _find_pair(cells["image_path"], root, list_folder)
    dataset = dataset or path.stem
    return {
        "image_id": pair.image.relative_to(root).as_posix(),
        "dataset": dataset,
        "label": LABELS.get(dataset),
        **{name: cells[name] for name in ("question", "answer", "position", "split")},
    }, pair


def _find_pair(name: str, root: Path, list_folder: ListFolder) -> tuple[ImageAndMask, str | None]:
    """The files a row means, and the name of their set; none is outside `root` (by name: links are their owner's choice)."""
    relative = PurePosixPath(posixpath.normpath(name.replace("\\", "/")))
    if "\0" in name or relative.is_absolute() or ".." in relative.parts or Path(name).is_absolute():
        raise BadRow(f"image_path {name[:80]!r} leaves {str(root)!r}", f"a path inside the data root, {LAYOUT}")
    folder = relative.parent.name
    kind = next((kind for kind in ("masks", "images") if folder in (f"{split}_{kind}" for split in SPLITS)), None)
    if kind is None:
        raise BadRow(f"image_path {name[:80]!r} is in no folder of images or masks", LAYOUT)
    given = root / relative
    other_folder = given.parent.with_name(folder.removesuffix(kind) + ("images" if kind == "masks" else "masks"))
    stem = given.stem.removesuffix(MASK_SUFFIX)
    stems = (stem,) if kind == "masks" else (given.stem, given.stem + MASK_SUFFIX)
    if given.name not in list_folder(given.parent):
        raise _missing(given, kind, root)
    other = _find_file(list_folder(other_folder), other_folder, stems, given.suffix)
    if other is None:
        suffix = ".jpg" if stem != given.stem else given.suffix
        raise _missing(other_folder / f"{stem}{suffix}", "images" if kind == "masks" else "masks", root)
    pair = ImageAndMask(other, given) if kind == "masks" else ImageAndMask(given, other)
    return pair, relative.parts[-3] if len(relative.parts) > 2 else None


def _missing(path: Path, kind: str, root: Path) -> BadRow:
    name = path.relative_to(root).as_posix()
    return BadRow(f"{kind.removesuffix('s')} {name!r}: no such file", "the file of the row", name)


def _list_folder(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def _find_file(names: frozenset[str], folder: Path, stems: tuple[str, ...], suffix: str) -> Path | None:
    """The file of one of the stems: with `suffix` if there is one, else with any image's."""
    candidates = [f"{stem}{ending}" for stem in stems for ending in (suffix, *SUFFIXES, *map(str.upper, SUFFIXES))]
    return next((folder / name for name in candidates if name in names), None)


def _check_files(rows: list[tuple[dict, ImageAndMask]], bad: BadRows, root: Path) -> list[tuple[dict, ImageAndMask]]:
    """The rows whose files open; `bad` meets the others."""
    reasons = find_bad_images(list({pair.key: pair for _, pair in rows}.values()), root, stop_at_first=bad.stops)
    good = []
    for record, pair in rows:
        if pair.key in reasons:
            expected = f"an image and a mask of one shape, each {EXPECTED}"
            bad.add(record["source"], record["row"], BadRow(reasons[pair.key], expected))
        else:
            good.append((record, pair))
    return good
