"""HAM10000's metadata, images and masks become a folder that trains, with boxes, and split by lesion.

DIR/ham10000_with_spatial_data.json, .csv    all records: the published keys in the published order
DIR/train.json, DIR/test.json                the records of either part
DIR/images/<image_id>.jpg                    the images as they are, or upright, by which the published scripts find them too
DIR/masks/<image_id>_segmentation.png        the masks: 0 and 255, one for each image, of its size
DIR/report.json                              what was left out and why, diagnoses per part, lesions that an image split would share

Boxes and areas are those of `engine.data.lesion_boxes`. Masks are read as everywhere (`engine.data.masks`); the published code
takes every pixel but 0, which is the same for HAM10000's masks of 0 and 255. What is so already is copied as it is.
"""

import csv
import hashlib
import io
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.command.settings import ALLOW_BURNED_IN, check_ranges, setting
from engine.data.images import ImageError, open_image, write_upright
from engine.data.lesion_boxes import LesionBox, find_lesion, name_region
from engine.data.lesions import COLUMNS, MASK_SUFFIX, RECORD_KEYS, check_age, check_diagnosis
from engine.data.masks.chosen import HELP, check_mask_values
from engine.data.masks.lesion_files import LesionFiles, looks_like_mask
from engine.data.masks.pair import ImageAndMask, is_plain_mask
from engine.data.prepare.folder import prepare_folder
from engine.data.prepare.prs_med import assign_splits
from engine.data.rows import BadRow, BadRows
from engine.data.tables import read_csv
from engine.errors import InputError
from engine.files import write_json, write_whole
from engine.progress import progress

NAME = "ham10000_with_spatial_data"
COUNTED = ("missing_images", "missing_masks", "united_masks", "bad_rows", "lesions_shared_by_image_split")


Found = tuple[int, dict[str, Any], Path, tuple[Path, ...]]  # row, its record without a box, image, masks


@dataclass
class SkinPreparation:
    """What to prepare."""

    metadata: str | None = setting(
        None, f"CSV with the columns {','.join(COLUMNS)}. None: drawn lesions, to start with.", metavar="FILE"
    )
    images: list[str] = setting(
        [], "Folders of images, looked through with the folders in them. None: the folder of the metadata.", metavar="DIR"
    )
    masks: list[str] = setting([], f"Folders of masks, <image_id>{MASK_SUFFIX}.png. None: those of the images.", metavar="DIR")
    mask_values: str | None = setting(None, HELP, metavar="VALUES")
    output: str | None = setting(None, "The folder to make.", metavar="DIR")
    test_fraction: float = setting(0.2, "Part of the images to test on, give or take a lesion.", more_than=0, less_than=1)
    seed: int = setting(42, "Seed of the split.", at_least=0, at_most=2**32 - 1)
    on_bad_row: str = setting("error", "Stop at a bad row, or list and skip it.", choices=["error", "skip"])
    overwrite: bool = setting(False, "Replace a folder that this command made.")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))
        check_mask_values(self.mask_values)

    @property
    def table(self) -> Path:
        """The metadata's file; InputError where none is named."""
        if self.metadata is None:
            raise InputError(f"--metadata is missing: the CSV file with the columns {','.join(COLUMNS)}")
        return Path(self.metadata)


@dataclass(frozen=True)
class Measured:
    """A usable row of the metadata: its record in the published format, and its files."""

    record: dict
    files: ImageAndMask | Path  # the image alone where it has no mask
    digest: str  # of the image's pixels

    def write(self, folder: Path) -> None:
        """Image and mask into the folders `images` and `masks`: as they are, where the image is upright and the mask plain."""
        image = self.files if isinstance(self.files, Path) else self.files.image
        write_upright(image, folder / "images" / image.name)
        if isinstance(self.files, Path):
            return
        mask = folder / "masks" / f"{self.record['image_id']}{MASK_SUFFIX}.png"
        opened = self.files.open()[1]
        if self.files.masks == (self.files.mask,) and is_plain_mask(self.files.mask, opened):
            shutil.copyfile(self.files.mask, mask)
        else:
            opened.save(mask)


def prepare_skin(options: SkinPreparation) -> dict:
    """Make the folder at `options.output` and return the headline numbers; see `engine.data.prepare.folder.prepare_folder`."""
    if options.table and options.output is None:
        raise InputError("--output is missing: the folder to make")
    return prepare_folder(options, "metadata", partial(build_skin, options), COUNTED)


def build_skin(options: SkinPreparation, folder: Path) -> dict:
    """Write images, masks and records into `folder`; returns the report."""
    missing: dict[str, list[str]] = {"missing_images": [], "missing_masks": [], "united_masks": []}
    bad = BadRows(options.on_bad_row)
    rows = list(_measure(list(_find_rows(options, missing, bad)), options, bad))
    if not rows:
        first = [*bad.lines(), *(f"no image {name!r} in {_image_folders(options)}" for name in missing["missing_images"])]
        raise InputError(f"{options.table}: no row is left; the first: {first[0]}" if first else f"{options.table}: no rows")
    parts = _split(rows, options)
    for split in ("train", "test"):
        if split not in parts.values():
            raise InputError(f"{options.table}: no lesion for {split} (expected more lesions than {len(rows)} images of few)")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for row in progress(rows, desc="copying images", unit="image", delay=2):
        row.write(folder)
    records = [row.record for row in rows]
    write_records(folder, records)
    counts, diagnoses = {}, {}
    for split in ("train", "test"):
        kept = [record for record in records if parts[record["image_id"]] == split]
        write_json(folder / f"{split}.json", kept)
        counts[split], diagnoses[split] = len(kept), dict(Counter(record["dx"] for record in kept).most_common())
    shared = _shared_by_image_split(records, options)
    left_out = {**missing, "bad_rows": bad.lines()}
    return {"rows": counts, "diagnoses": diagnoses, **left_out, "lesions_shared_by_image_split": shared}


def write_records(folder: Path, records: list[dict]) -> None:
    """The published pair of files: JSON (with null for pandas' NaN, which is no JSON) and the CSV that pandas makes of it."""
    write_json(folder / f"{NAME}.json", records)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, RECORD_KEYS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_whole(folder / f"{NAME}.csv", table.getvalue())


def _image_folders(options: SkinPreparation) -> str:
    return ", ".join(options.images) or str(options.table.parent)


def _find_rows(options: SkinPreparation, missing: dict[str, list[str]], bad: BadRows) -> Iterator[Found]:
    """(row, record without a box, image, mask) of the rows with an image; `missing` and `bad` learn of the others."""
    for folder in (*options.images, *options.masks):
        if not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder (expected one of {'images' if folder in options.images else 'masks'})")
    files = LesionFiles([*map(Path, options.images)] or [options.table.parent], [*map(Path, options.masks)])
    seen: set[str] = set()
    for index, line, cells in read_csv(options.table, COLUMNS, COLUMNS):
        try:
            record = _check_metadata(cells, seen)
            image, masks = files.find(record["image_id"])
        except BadRow as error:
            bad.add(options.table, index, error, line)
            continue
        name = record["image_id"]
        if image is None:
            missing["missing_images"].append(name)
            continue
        if not masks:
            missing["missing_masks"].append(name)
        if len(masks) > 1:
            missing["united_masks"].append(name)
        yield index, record, image, masks


def _check_metadata(cells: dict[str, str] | BadRow, seen: set[str]) -> dict[str, Any]:
    """The cells as a record; BadRow if they cannot be used. `seen` are the image_ids so far."""
    if isinstance(cells, BadRow):
        raise cells
    record: dict[str, Any] = {key: cells[key].strip() or None for key in COLUMNS}
    for key in ("lesion_id", "image_id"):
        if record[key] is None:
            raise BadRow(f"empty {key}", f"{key} to be filled")
    if record["image_id"] in seen:
        raise BadRow(f"image_id {record['image_id'][:80]!r} again", "each image once")
    seen.add(record["image_id"])
    record["dx"], record["age"] = check_diagnosis(record["dx"]), check_age(record["age"])
    return record


def _measure(rows: list[Found], options: SkinPreparation, bad: BadRows) -> Iterator[Measured]:
    """Open images and masks; the rows whose files can be used, with boxes. `bad` meets the others."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        files = [ImageAndMask(image, masks[0], masks[1:], options.mask_values) if masks else image for _, _, image, masks in rows]
        measured = pool.map(_open, files)
        bar = progress(measured, desc="reading", total=len(rows), delay=2)
        for (index, record, *_), files_of_row, found in zip(rows, files, bar, strict=True):
            if isinstance(found, str):
                expected = "a whole JPEG or PNG image and a mask of its shape that is not empty"
                bad.add(options.table, index, BadRow(found, expected))
                continue
            lesion, size, digest = found
            yield Measured(record | _spatial(lesion, size), files_of_row, digest)
    finally:
        pool.shutdown(cancel_futures=True)


def _open(files: ImageAndMask | Path) -> tuple[LesionBox | None, tuple[int, int], str] | str:
    """(its lesion, the image's size, digest of its pixels), or why the files cannot be used."""
    path = files if isinstance(files, Path) else files.image
    try:
        picture, mask = (open_image(files), None) if isinstance(files, Path) else files.open()
    except ImageError as error:
        return f"image {path.name!r}: {error.reason}" if isinstance(files, Path) else error.reason
    if looks_like_mask(picture):
        return f"image {path.name!r} is black and white: a mask and no image"
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
    if isinstance(files, Path):
        return None, picture.size, digest
    found = find_lesion(np.asarray(mask))
    return (found, picture.size, digest) if found else f"mask {files.mask.name!r} is empty"


def _spatial(lesion: LesionBox | None, size: tuple[int, int]) -> dict:
    """The last four keys of a record."""
    if lesion is None:
        return {"bbox": None, "area_coverage": None, "spatial_description": None, "mask_available": False}
    return {
        "bbox": list(lesion.bbox),
        "area_coverage": lesion.coverage,
        "spatial_description": f"lesion located in {name_region(lesion.bbox, size)} region",
        "mask_available": True,
    }


def _split(rows: list[Measured], options: SkinPreparation) -> dict[str, str]:
    """{image_id: train or test}: the images of one lesion stay together, and so do lesions that share an image's pixels."""
    group_of: dict[str, str] = {}  # a lesion -> another of its group, or itself

    def find(lesion: str) -> str:
        while group_of.setdefault(lesion, lesion) != lesion:
            lesion = group_of[lesion]
        return lesion

    first: dict[str, str] = {}
    for row in rows:
        lesion = row.record["lesion_id"]
        group_of[find(lesion)] = find(first.setdefault(row.digest, lesion))
    groups = {row.record["image_id"]: find(row.record["lesion_id"]) for row in rows}
    return assign_splits(groups, (1 - options.test_fraction, 0.0, options.test_fraction), random.Random(options.seed))


def _shared_by_image_split(records: list[dict], options: SkinPreparation) -> list[str]:
    """The lesions that a split by image, as the published one is, would show in both parts."""
    lesions = [record["lesion_id"] for record in records]
    random.Random(options.seed).shuffle(lesions)
    cut = round((1 - options.test_fraction) * len(lesions))
    return sorted(set(lesions[:cut]) & set(lesions[cut:]))
