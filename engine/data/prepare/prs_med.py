"""From folders of images and masks to a set of a data root that PRS-Med trains on: splits, positions, questions and answers.

    ROOT/<set>/<split>_images/NAME.png, <split>_masks/NAME.png      8 bits; masks 0 and 255
    ROOT/<set>/report.json                                          counts, positions per split, united masks, what was left out
    ROOT/annotations/<set>.csv                                      see `engine.data.masked_questions`

Images with the same pixels, and those whose names `group` says belong together (slices of one patient), stay in one split.
Several masks of one image are united as one of several lesions. Empty masks have no position and are left out, as in the published
data.
"""

import csv
import hashlib
import io
import os
import posixpath
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from engine.command.settings import ALLOW_BURNED_IN, setting
from engine.data.images import ImageError
from engine.data.masked_questions import COLUMNS, SPLITS
from engine.data.masks.chosen import HELP, check_mask_values
from engine.data.masks.names import KNOWN, SUFFIXES, MaskNames, bare_name
from engine.data.masks.pair import ImageAndMask
from engine.data.positions import RULES, Position, ask, label, locate
from engine.errors import InputError
from engine.files import visible_files, write_json, write_whole
from engine.progress import progress


@dataclass
class SetPreparation:
    """The data root, and the set to make in it."""

    data_root: str = setting("", "The folder of the sets and of annotations/. None: the starter data, to check.", metavar="DIR")
    dataset: str = setting("", "Make this set. None: check the data root.", metavar="NAME")
    images: str | None = setting(None, "Its images: PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM, also in folders.", metavar="DIR")
    masks: str | None = setting(None, "Its masks, of the same names, also ending in _mask or the like.", metavar="DIR")
    mask_values: str | None = setting(None, HELP, metavar="VALUES")
    finding: str = setting("tumor", "What the masks show, as the questions call it.")
    modality: str = setting("medical image", "What the images are.")
    rule: str = setting("prs-med", "How masks become positions.", choices=list(RULES))
    fractions: str = setting("0.7,0.1,0.2", "Of train, val and test.", metavar="T,V,T")
    group: str | None = setting(None, "Images whose names match it alike stay in one split, e.g. '^(\\d+)_'.", metavar="REGEX")
    seed: int = setting(42, "Seed of the splits and of the questions.", at_least=0)
    on_bad_row: str = setting("error", "Stop at an unusable image, or list and skip it.", choices=["error", "skip"])
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)

    def __post_init__(self) -> None:
        self.shares = read_fractions(self.fractions)
        check_mask_values(self.mask_values)


def read_fractions(text: str) -> tuple[float, float, float]:
    """The fractions of train, val and test in `0.7,0.1,0.2`; InputError if they are not three of sum 1."""
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--fractions {text}: expected three numbers, of train, val and test") from None
    if not (min(train, val, test) >= 0 and abs(train + val + test - 1) <= 1e-6):  # NaN is neither
        raise InputError(f"--fractions {text}: expected three fractions whose sum is 1")
    return train, val, test


def prepare_set(options: SetPreparation) -> dict:
    """Make the set out of `images` and `masks`, or, without these, only the annotations of split folders that are there already.

    Returns the headline numbers: rows per split, files left out, rows whose mask is of several files, the most frequent place and
    its share, the CSV's path.
    """
    root = Path(os.path.abspath(options.data_root))
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", options.dataset) or options.dataset in ("annotations", *SPLITS):
        raise InputError(f"--dataset {options.dataset!r}: expected a name of letters, digits, '_', '-' and '.'")
    try:
        re.compile(options.group or "")
    except re.error as error:
        raise InputError(f"--group {options.group}: not a regular expression ({error})") from None
    table = root / "annotations" / f"{options.dataset}.csv"
    if table.exists():
        raise InputError(f"{table}: exists already (expected a new --dataset)")
    rng = random.Random(options.seed)
    if options.images:
        building = root / f".{options.dataset}.{os.getpid()}.part"
        try:
            rows, left_out = _copy(options, Path(options.images), root, building, rng)
            _finish(building, rows, left_out, options)
            os.replace(building, root / options.dataset)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    else:
        rows, left_out = _annotate(options, root, rng)
        _finish(root / options.dataset, rows, left_out, options)
    write_whole(table, _as_csv(rows))
    (place, count), *_ = Counter(row["place"] for row in rows).most_common(1)
    counts = {f"{split}_rows": sum(row["split"] == split for row in rows) for split in SPLITS}
    counts |= {"left_out": len(left_out), "united_masks": sum(row["num_masks"] > 1 for row in rows)}
    return counts | {"majority": place, "majority_share": count / len(rows), "annotations": str(table)}


def _finish(folder: Path, rows: list[dict], left_out: list[str], options: SetPreparation) -> None:
    if not rows:
        raise InputError(f"--dataset {options.dataset}: no row is left" + (f"; the first: {left_out[0]}" if left_out else ""))
    places = {split: dict(Counter(row["place"] for row in rows if row["split"] == split)) for split in SPLITS}
    made_with = asdict(options) | {"fractions": options.shares}
    united = [row["image_path"] for row in rows if row["num_masks"] > 1]
    write_json(folder / "report.json", {"options": made_with, "places": places, "united_masks": united, "left_out": left_out})


def _as_csv(rows: list[dict]) -> str:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def _copy(options: SetPreparation, images: Path, root: Path, building: Path, rng: random.Random) -> tuple[list[dict], list[str]]:
    """Write images and masks into `building`; rows, and a line for each file left out."""
    if (root / options.dataset).exists():
        raise InputError(f"{root / options.dataset}: exists already (expected a new --dataset, or no --images)")
    pairs, left_out = find_pairs(images, Path(options.masks or images), options)
    opened = list(_open(pairs.items(), options, left_out))
    splits = assign_splits({name: _group_of(name, digest, options.group) for name, digest, *_ in opened}, options.shares, rng)
    rows: list[dict] = []
    taken: dict[str, str] = {}  # file -> the name that becomes it
    for name, _, positions, pair in opened:
        split, file = splits[name], re.sub(r"[^\w().-]", "_", name) + ".png"
        if taken.setdefault(file, name) != name:
            raise InputError(f"{images}: {name!r} and {taken[file]!r} would both become {file!r} (expected distinct names)")
        image, mask = pair.open()
        for kind, picture in (("images", image), ("masks", mask)):
            folder = building / f"{split}_{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / file)
        rows.append(_row(file, split, positions, pair, options, rng))
    return rows, left_out


def _annotate(options: SetPreparation, root: Path, rng: random.Random) -> tuple[list[dict], list[str]]:
    folder, rows, left_out = root / options.dataset, [], []
    there = [split for split in SPLITS if (folder / f"{split}_images").is_dir()]
    if not there:
        raise InputError(f"{folder}: no split folders (expected <split>_images and <split>_masks in it, or --images and --masks)")
    for split in there:
        folders = folder / f"{split}_images", folder / f"{split}_masks"
        pairs, missing = find_pairs(*folders, options)
        left_out += missing
        for _, _, positions, pair in _open(pairs.items(), options, left_out):
            named = pair.mask.relative_to(folders[1]) if options.rule == "prs-med" else pair.image.relative_to(folders[0])
            rows.append(_row(named.as_posix(), split, positions, pair, options, rng))
    return rows, left_out


def _row(
    file: str, split: str, positions: Sequence[Position], pair: ImageAndMask, options: SetPreparation, rng: random.Random
) -> dict:
    question, answer = ask(
        positions, rng, finding=options.finding, modality=options.modality, rule=options.rule, test=split == "test"
    )
    kind = "masks" if options.rule == "prs-med" else "images"  # as the published files of either rule do
    return {
        "image_path": f"{options.dataset}/{split}_{kind}/{file}",
        "image_name": posixpath.basename(file),
        "question": question,
        "answer": answer,
        "position": label(positions, options.rule),
        "split": split,
        "place": " + ".join(position.place for position in positions),
        "num_masks": len(pair.masks),
    }


def find_pairs(images: Path, masks: Path, options: SetPreparation) -> tuple[dict[str, ImageAndMask], list[str]]:
    """{name: files} of the images below one folder that have a mask in the other; a line for each that has none, or no clear one.

    `engine.data.masks.names` says what the masks may be called.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder (expected one of {'images' if folder == images else 'masks'})")
    in_one_folder = images.samefile(masks)
    names = MaskNames((bare_name(path, masks), path) for path in _image_files(masks))
    pairs, alone = {}, []
    for path in _image_files(images):
        name = bare_name(path, images)
        if in_one_folder and names.is_mask(name):
            continue
        if name in pairs:
            raise InputError(f"{path}: a second image called {name!r} (expected one a name, whatever its ending)")
        try:
            found = names.masks_of(name, path.suffix, in_one_folder)
        except InputError as error:
            if options.on_bad_row == "error":
                raise
            alone.append(str(error))
            continue
        if found:
            pairs[name] = ImageAndMask(path, found[0], found[1:], options.mask_values)
        else:
            alone.append(f"{path}: no mask of this name in {masks}")
    if not pairs:
        first = f"; the first: {alone[0]}" if alone else ""
        raise InputError(f"{images}: no image with a mask (expected masks in {masks} {KNOWN}{first})")
    return pairs, alone


def _image_files(folder: Path) -> list[Path]:
    return [path for path in visible_files(folder, "**/*") if path.suffix.lower() in SUFFIXES]


def _open(
    pairs: Iterable[tuple[str, ImageAndMask]], options: SetPreparation, left_out: list[str]
) -> Iterator[tuple[str, str, tuple[Position, ...], ImageAndMask]]:
    """(name, digest of the pixels, positions, files) of the pairs that can be used; lines of the others go to `left_out`."""
    for name, pair in progress(pairs, desc="reading masks", unit="image", delay=2):
        try:
            image, mask = pair.open()
        except ImageError as error:
            if options.on_bad_row == "error":
                raise
            left_out.append(str(error))
            continue
        positions = locate(np.asarray(mask), options.rule)
        if positions:
            yield name, _digest(image), positions, pair
        else:
            left_out.append(f"{pair.mask}: empty mask, no position")


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _group_of(name: str, digest: str, pattern: str | None) -> str:
    found = re.search(pattern, name) if pattern else None
    return digest if found is None else f"group {found[1] if found.re.groups else found[0]}"


def assign_splits(groups: dict[str, str], fractions: Sequence[float], rng: random.Random) -> dict[str, str]:
    """{name: its group} -> {name: split}: groups in random order fill test, then val, up to their fractions; the rest is train."""
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    order = list(members.values())
    rng.shuffle(order)
    wanted = {"test": round(fractions[2] * len(groups)), "val": round(fractions[1] * len(groups))}
    splits: dict[str, str] = {}
    for names in order:
        split = next((split for split in wanted if wanted[split] >= len(names)), "train")
        splits |= dict.fromkeys(names, split)
        if split in wanted:
            wanted[split] -= len(names)
    return splits
