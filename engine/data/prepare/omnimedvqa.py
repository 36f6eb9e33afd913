"""From Med-R1's published split files and OmniMedVQA's images to a folder that trains: what the paper did offline.

The folder is that of `engine.data.prepare.folder`: training images at size x size pixels, test images as they are unless asked.
The published split is by row, so that an image can stand in both parts.
"""

import contextlib
import os
import posixpath
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.command.settings import ALLOW_BURNED_IN, REQUIRED, check_ranges, setting
from engine.data.formats.folders import ENDINGS, bare_name, ending
from engine.data.prepare.folder import finish, prepare_folder, relative_name, write_images
from engine.data.questions import load_questions
from engine.data.sources import read_source
from engine.data.split_names import KINDS, name_of_split
from engine.errors import InputError
from engine.files import visible_files


@dataclass
class Preparation:
    """What to prepare."""

    splits: str = setting(REQUIRED, "Med-R1's Splits folder.", metavar="DIR")
    images: str = setting(REQUIRED, "The folder that holds Images/, with which the rows' paths begin.", metavar="DIR")
    output: str = setting(REQUIRED, "The folder to make.", metavar="DIR")
    kind: str = setting("modality", "Which splits.", choices=list(KINDS))
    names: list[str] | None = setting(
        None, "E.g. CT MRI 'Lesion Grading', short or as published. None: all files there.", metavar="NAME"
    )
    size: int = setting(384, "Side of the training images in pixels.", at_least=28, at_most=4096)
    resize_test: bool = setting(False, "Resize test images too.")
    drop_leaked: bool = setting(False, "Take images that also occur in test out of train.")
    on_bad_row: str = setting("error", "Stop at a bad row, or list and skip it.", choices=["error", "skip"])
    overwrite: bool = setting(False, "Replace a folder that this command made.")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


def prepare(options: Preparation) -> dict:
    """Make the folder at `options.output` and return the headline numbers; see `prepare_folder`."""
    return prepare_folder(options, "splits", partial(_build, options))


def find_split_files(splits: Path, kind: str, names: list[str] | None = None) -> dict[str, list[Path]]:
    """{"train": files, "test": files} of the published names asked for (short ones will do), by default of all that are there."""
    found: dict[str, dict[str, Path]] = {split: {} for split in ("train", "test")}
    for split, files in found.items():
        for path in visible_files(splits / kind / split, f"*_{split}.*"):
            name = bare_name(path).removesuffix(f"_{split}")
            if ending(path) in ENDINGS and files.setdefault(name, path) is not path:
                raise InputError(f"{path}: also there as {files[name].name} (expected one file a name)")
    present = sorted(set(found["train"]) | set(found["test"]))
    if not present:
        raise InputError(f"{splits / kind}: no split files (expected train/<name>_train.json and test/<name>_test.json in it)")
    published = {short.lower(): name for short, name in KINDS[kind].items()} | {name.lower(): name for name in present}
    chosen = present if names is None else [published.get(name.lower(), name) for name in names]
    for name in chosen:
        if name not in present:
            raise InputError(f"{splits / kind}: no split files for {name!r} (expected one of {', '.join(present)})")
    return {split: [files[name] for name in dict.fromkeys(chosen) if name in files] for split, files in found.items()}


def _image_root(images: Path) -> Path:
    """The folder that holds `Images/`, with which every published path begins, also where `Images` itself was given."""
    if not images.is_dir():
        raise InputError(f"{images}: no such folder (expected the one that holds OmniMedVQA's Images)")
    images = Path(os.path.abspath(images))
    return images.parent if images.name == "Images" and not (images / "Images").exists() else images


def _build(options: Preparation, folder: Path) -> dict:
    """Write images and rows into `folder`; returns the report."""
    files = find_split_files(Path(options.splits), options.kind, options.names)
    root = _image_root(Path(options.images))
    parts = {split: load_questions(files[split], image_root=root, on_bad_row=options.on_bad_row) for split in files if files[split]}
    other_labels = _labels_of_other_kind(Path(options.splits), options.kind)
    rows = {}
    for split, questions in parts.items():
        size = options.size if split == "train" or options.resize_test else None
        rows[split] = write_images(folder, split, questions, lambda handle: relative_name(handle.key, root), size)
        for row in rows[split]:
            for kind, label in other_labels.get((*row["original"], row["problem"]), {}).items():
                row[kind] = row[kind] or label
    bad = [line for questions in parts.values() for line in questions.skipped]
    return finish(folder, rows, bad, origin=options.splits, root=root, kind=options.kind, drop_leaked=options.drop_leaked)


def _labels_of_other_kind(splits: Path, kind: str) -> dict[tuple[Any, ...], dict[str, str]]:
    """(image paths..., problem) -> the label that the other kind's split files, which hold the same rows, give it."""
    (other,) = set(KINDS) - {kind}
    labels: dict[tuple[Any, ...], dict[str, str]] = {}
    for path in visible_files(splits / other, "*/*"):
        if ending(path) not in ENDINGS:
            continue
        with contextlib.suppress(InputError):  # nobody asked for these files
            for row in read_source(path, "train").rows:
                if isinstance(row, dict) and isinstance(row.get("image"), str):
                    labels[posixpath.normpath(row["image"]), row.get("problem")] = name_of_split(path)
    return labels
