"""Questions about an image and the mask that answers them, in PRS-Med's published CSV format (arXiv:2505.11872).

    ROOT/annotations/<set>.csv       image_path,image_name,question,answer,position,split
    ROOT/<set>/<split>_images/FILE   ROOT/<set>/<split>_masks/FILE      split: train, val or test

`image_path` starts at ROOT and names the mask (the six PRS-Med sets) or the image (`our-dataset`'s two), in the folder or in
folders in it; the other file lies at the same place in the other folder, and `engine.data.masks.names` says what it may be called
(ISIC's `X.jpg` has the mask `X_Segmentation.png`). Masks that are parts of one are united. `[i]` gives

    image: PIL RGB       mask: PIL L of the image's size, 0 or 255        question, answer, position, split: str, as in the file
    image_id: str        dataset: str, the set's folder                   label: the published class 0-5, None for other sets
    row: int, counted from 0 without the header                           source: str, the file it stands in

What becomes of a bad row: see `engine.data.rows`.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from engine.data.formats.folders import TABLES
from engine.data.image_check import find_bad_images
from engine.data.images import EXPECTED
from engine.data.loaders.undecoded import read_undecoded
from engine.data.masks.chosen import check_mask_values
from engine.data.masks.names import KNOWN, SUFFIXES, MaskNames, split_name
from engine.data.masks.pair import ImageAndMask
from engine.data.rows import BadRow, BadRows, Rows, evenly_spread
from engine.data.sources import ImageFile
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
ListFolder = Callable[[Path], MaskNames]
KINDS = {f"{split}_{kind}": kind for split in SPLITS for kind in ("images", "masks")}
LAYOUT = "<set>/<split>_masks/<file> or <set>/<split>_images/<file>"


class MaskedQuestions(Rows[ImageAndMask]):
    """Checked rows, each with an image and its mask."""

    def open(self, handle: ImageAndMask) -> dict[str, Any]:
        image, mask = handle.open()
        return {"image": image, "mask": mask}

    def undecoded(self, index: int) -> dict[str, Any]:
        image, mask = self.handles[index].open_as(lambda path: read_undecoded(ImageFile(path)))
        return {**self.records[index], "image": image, "mask": mask}


def load_masked_questions(
    data_root: str | Path,
    ann_paths: str | Sequence[str | Path] | None = None,
    *,
    split: str | None = "train",
    on_bad_row: str = "error",
    limit: int | None = None,
    mask_values: str | None = None,
) -> MaskedQuestions:
    """The rows of `split` (None: of all splits) in the CSV files `ann_paths`, one file after the other.

    `ann_paths` is a list or comma-separated, each from here or from `data_root`; by default all of ROOT/annotations. `limit` takes
    only so many rows of the split, evenly spread, before any are skipped. `mask_values` says which values of the masks are lesions
    (see `engine.data.masks.chosen`). InputError for a bad row, and where no row is left.
    """
    bad = BadRows(on_bad_row)
    check_mask_values(mask_values)
    if split not in (*SPLITS, None):
        raise InputError(f"split {split!r} (expected one of {', '.join(SPLITS)})")
    root = _existing_folder(data_root)
    asked: list[tuple[Path, int, int, dict[str, str] | BadRow]] = []  # rows of the split, and those that are none
    seen: Counter[str] = Counter()  # rows of each split
    named: set[str] = set()  # every file that a row names
    for path in find_annotations(root, ann_paths):
        for index, line, cells in read_csv(path, COLUMNS, FILLED):
            filled = _filled(cells)
            if isinstance(filled, dict):
                named.add(_normal(filled["image_path"]))
                seen[filled["split"]] += 1
            if isinstance(filled, BadRow) or split in (None, filled["split"]):
                asked.append((path, index, line, filled))
    rows: list[tuple[dict, ImageAndMask]] = []
    list_folder = cache(_list_folder)  # many rows ask about few folders
    for path, index, line, cells in (asked[i] for i in evenly_spread(len(asked), limit)):
        try:
            record, pair = _check_row(cells, root, path, named, list_folder)
            rows.append(({**record, "row": index, "source": str(path)}, replace(pair, mask_values=mask_values)))
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


def check_data_root(
    data_root: str | Path, ann_paths: str | Sequence[str | Path] | None = None, mask_values: str | None = None
) -> dict:
    """What a data root holds and lacks.

    {"sets": {name: {split: number of usable rows}}, "missing_sets": published ones that are not there although others of their
    family are, "missing_files": [...], "bad_rows": [one line each], "united_masks": number of rows whose mask is in several files}
    """
    rows = load_masked_questions(data_root, ann_paths, split=None, on_bad_row="skip", mask_values=mask_values)
    sets: dict[str, Counter] = {}
    for record in rows.records:
        sets.setdefault(record["dataset"], Counter())[record["split"]] += 1
    families = [names for names in FAMILIES.values() if set(names) & set(sets)]
    return {
        "sets": {name: dict(counts) for name, counts in sets.items()},
        "missing_sets": [name for names in families for name in names if name not in sets],
        "missing_files": sorted({line.missing_image for line in rows.skipped if line.missing_image}),
        "bad_rows": rows.skipped,
        "united_masks": sum(len(pair.masks) > 1 for pair in rows.handles),
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


def _check_row(
    cells: dict[str, str] | BadRow, root: Path, path: Path, named: set[str], list_folder: ListFolder
) -> tuple[dict, ImageAndMask]:
    """Filled cells -> (record, its files); BadRow if the files are not there."""
    if isinstance(cells, BadRow):
        raise cells
    pair, dataset = _find_pair(cells["image_path"], root, named, list_folder)
    dataset = dataset or path.stem
    return {
        "image_id": pair.image.relative_to(root).as_posix(),
        "dataset": dataset,
        "label": LABELS.get(dataset),
        **{name: cells[name] for name in ("question", "answer", "position", "split")},
    }, pair


def _normal(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


def _find_pair(name: str, root: Path, named: set[str], list_folder: ListFolder) -> tuple[ImageAndMask, str | None]:
    """The files a row means, and the name of their set; none is outside `root` (by name: links are their owner's choice).

    A mask that another row names is not united with this one's.
    """
    relative = PurePosixPath(_normal(name))
    if "\0" in name or relative.is_absolute() or ".." in relative.parts or Path(name).is_absolute():
        raise BadRow(f"image_path {name[:80]!r} leaves {str(root)!r}", f"a path inside the data root, {LAYOUT}")
    folders = relative.parts[:-1]
    place = next((i for i in reversed(range(len(folders))) if folders[i] in KINDS), None)
    if place is None:
        raise BadRow(f"image_path {name[:80]!r} is in no folder of images or masks", LAYOUT)
    kind, dataset = KINDS[folders[place]], folders[place - 1] if place else None
    given = root / relative
    other = "images" if kind == "masks" else "masks"
    other_folder = root.joinpath(*folders[:place], folders[place].removesuffix(kind) + other, *folders[place + 1 :])
    beside, there = list_folder(given.parent), list_folder(other_folder)
    if given not in beside.exact.get(given.stem, ()) and not given.is_file():
        raise _missing(given, kind, root)
    image: Path | None
    try:
        if kind == "images":
            image, masks = given, there.masks_of(given.stem, given.suffix)
        else:
            image, masks = _image_of(given, there), beside.parts_of(given)
    except InputError as error:
        raise BadRow(str(error), "one mask, or several that are numbered") from None
    if image is None or not masks:
        raise _missing(other_folder / given.name, other, root)
    if kind == "masks":
        parts = (mask for mask in masks if mask.relative_to(root).as_posix() not in named and image.stem != given.stem)
        masks = (given, *parts)
    return ImageAndMask(image, masks[0], masks[1:]), dataset


def _image_of(mask: Path, images: MaskNames) -> Path | None:
    """The image of a mask: of its name, or of its name without the ending."""
    parts = split_name(mask.stem)
    for stem in (mask.stem, *([parts[0]] if parts else [])):
        if stem in images.exact:
            return min(images.exact[stem], key=lambda file: (file.suffix != mask.suffix, SUFFIXES.index(file.suffix.lower())))
    return None


def _missing(path: Path, kind: str, root: Path) -> BadRow:
    name = path.relative_to(root).as_posix()
    expected = "the file of the row" if kind == "images" else f"a file {KNOWN}"
    return BadRow(f"{kind.removesuffix('s')} {name!r}: no such file", expected, name)


def _list_folder(folder: Path) -> MaskNames:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    return MaskNames((path.stem, path) for path in (folder / name for name in names) if path.suffix.lower() in SUFFIXES)


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
