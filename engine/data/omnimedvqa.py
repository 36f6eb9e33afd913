"""From Med-R1's published split files and OmniMedVQA's images to a folder that trains: what the paper did offline.

DIR/train.json, DIR/test.json    the rows: image, problem, solution, modality, question_type, original (the published path)
DIR/images/train/<hash>.png      training images at size x size pixels (bicubic, RGB); the hash is of the original's pixels
DIR/images/test/<hash>.<ext>     test images as they are, since the paper evaluates on originals; resized only on demand
DIR/report.json                  what was left out and why, and which test images also occur in train

The split is by row, so an image can stand in both parts: the same file, or another file with the same pixels. Both are found.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from engine.data.questions import QuestionSet, load_questions
from engine.data.sources import read_source
from engine.data.split_names import KINDS, name_of_split
from engine.errors import InputError
from engine.files import write_json

CHUNK = 256  # images in flight: bounds the memory of those encoded but not yet written


@dataclass
class Preparation:
    """What to prepare; the fields are the flags of `recipes.medr1_prepare`."""

    splits: str
    images: str
    output: str
    kind: str = "modality"
    names: list[str] | None = None
    size: int = 384
    resize_test: bool = False
    drop_leaked: bool = False
    on_bad_row: str = "error"
    overwrite: bool = False


def prepare(options: Preparation) -> dict:
    """Build the folder beside `output`, put it there whole, and return the headline numbers (counts, and the folder's path)."""
    output = Path(os.path.abspath(options.output))
    _refuse_to_lose(output, options.overwrite)
    if not 28 <= options.size <= 4096:
        raise InputError(f"--size {options.size}: expected 28 to 4096 pixels")
    files = find_split_files(Path(options.splits), options.kind, options.names)
    root = _image_root(Path(options.images))
    parts = {split: load_questions(files[split], image_root=root, on_bad_row=options.on_bad_row) for split in files if files[split]}
    building = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{building.parent}: cannot hold the output folder ({error.strerror})") from None
    try:
        report = {"options": asdict(options), **_build(building, parts, root, options)}
        write_json(building / "report.json", report)
        _put_in_place(building, output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    counts = {key: len(report[key]) for key in ("missing_images", "bad_rows", "leaked_rows")}
    return {"train_rows": report["rows"]["train"], "test_rows": report["rows"]["test"], **counts, "output": str(output)}


def find_split_files(splits: Path, kind: str, names: list[str] | None = None) -> dict[str, list[Path]]:
    """{"train": files, "test": files} of the published names asked for (short ones will do), by default of all that are there."""
    found = {split: {} for split in ("train", "test")}
    for split, files in found.items():
        for path in sorted((splits / kind / split).glob(f"*_{split}.json")):
            files[path.stem.removesuffix(f"_{split}")] = path
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


def _build(folder: Path, parts: dict[str, QuestionSet], root: Path, options: Preparation) -> dict:
    """Write images and rows into `folder`; returns the report."""
    other_labels = _labels_of_other_kind(Path(options.splits), options.kind)
    rows = {"train": [], "test": []}
    for split, questions in parts.items():
        size = options.size if split == "train" or options.resize_test else None
        names = _write_images(folder, split, questions, size)
        for record, handles in zip(questions.records, questions.images, strict=True):
            originals = [os.path.relpath(handle.key, root) for handle in handles]
            row = {"image": [names[handle.key] for handle in handles], "original": originals, **record}
            for kind, label in other_labels.get((*originals, record["problem"]), {}).items():
                row[kind] = row[kind] or label
            rows[split].append(row)
    leaked = _find_leaks(rows["train"], rows["test"])
    dropped = _drop_leaked(folder, rows, leaked) if options.drop_leaked else 0
    for split in parts:
        if not rows[split]:
            raise InputError(f"{options.splits}: no {split} row is left (all use images that also occur in test)")
        write_json(folder / f"{split}.json", [_published_row(row) for row in rows[split]])
    bad = [line for questions in parts.values() for line in questions.skipped]
    return {
        "rows": {split: len(rows[split]) for split in rows},
        "names": {split: dict(Counter(row[options.kind] for row in rows[split])) for split in rows},
        "missing_images": sorted({os.path.relpath(line.missing_image, root) for line in bad if line.missing_image}),
        "bad_rows": bad,
        "leaked_rows": leaked,
        "dropped_train_rows": dropped,
    }


def _published_row(row: dict) -> dict:
    """The row as the file keeps it: lists of one image as that image, no empty labels."""
    image, original = (row[key][0] if len(row[key]) == 1 else row[key] for key in ("image", "original"))
    labels = {key: row[key] for key in ("modality", "question_type") if row[key]}
    return {"image": image, "problem": row["problem"], "solution": row["solution"], **labels, "original": original}


def _labels_of_other_kind(splits: Path, kind: str) -> dict[tuple[str, ...], dict[str, str]]:
    """(image paths..., problem) -> the label that the other kind's split files, which hold the same rows, give it."""
    (other,) = set(KINDS) - {kind}
    labels = {}
    for path in sorted((splits / other).glob("*/*.json")):
        with contextlib.suppress(InputError):  # nobody asked for these files
            for row in read_source(path, "train").rows:
                if isinstance(row, dict) and isinstance(row.get("image"), str):
                    labels[os.path.normpath(row["image"]), row.get("problem")] = name_of_split(path)
    return labels


def _write_images(folder: Path, split: str, questions: QuestionSet, size: int | None) -> dict[str, str]:
    """Write each distinct image once; {key: name within `folder`}. Images with the same pixels share a file."""
    (folder / "images" / split).mkdir(parents=True)
    handles = list({handle.key: handle for images in questions.images for handle in images}.values())
    names = {}
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(handles), desc=f"{split} images", unit="image") as bar,
    ):
        for start in range(0, len(handles), CHUNK):
            chunk = handles[start : start + CHUNK]
            for handle, (name, data) in zip(chunk, pool.map(lambda handle: _encode(handle, size), chunk), strict=True):
                names[handle.key] = f"images/{split}/{name}"
                if not (folder / names[handle.key]).exists():
                    (folder / names[handle.key]).write_bytes(data)
                bar.update()
    return names


def _encode(handle, size: int | None) -> tuple[str, bytes]:
    """(file name, content): the file itself, or its image at size x size as PNG; named after the pixels of the original."""
    image = handle.open()
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]
    if size is None:
        return f"{digest}{handle.path.suffix.lower()}", handle.path.read_bytes()
    content = io.BytesIO()
    image.resize((size, size), Image.Resampling.BICUBIC).save(content, "PNG")
    return f"{digest}.png", content.getvalue()


def _pixels(name: str) -> str:
    return Path(name).stem


def _find_leaks(train: list[dict], test: list[dict]) -> list[dict]:
    """The test rows one of whose images is in train, by its path or by its pixels."""
    paths = {path for row in train for path in row["original"]}
    pixels = {_pixels(name) for row in train for name in row["image"]}
    leaks = []
    for row in test:
        by = {"path": bool(paths & set(row["original"])), "pixels": bool(pixels & set(map(_pixels, row["image"])))}
        if any(by.values()):
            same = [kind for kind, found in by.items() if found]
            leaks.append({"source": row["source"], "row": row["row"], "image": row["original"], "same": same})
    return leaks


def _drop_leaked(folder: Path, rows: dict[str, list[dict]], leaked: list[dict]) -> int:
    """Take the train rows whose images also occur in test out of `rows`, and the images that no row needs any more."""
    if not leaked:
        return 0
    paths = {path for row in rows["test"] for path in row["original"]}
    pixels = {_pixels(name) for row in rows["test"] for name in row["image"]}
    before = rows["train"]
    rows["train"] = [row for row in before if not (paths & set(row["original"]) or pixels & set(map(_pixels, row["image"])))]
    for name in {name for row in before for name in row["image"]} - {name for row in rows["train"] for name in row["image"]}:
        (folder / name).unlink()
    return len(before) - len(rows["train"])


def _refuse_to_lose(output: Path, overwrite: bool) -> None:
    """InputError if `output` holds something that may not be replaced."""
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{output}: exists already (--overwrite replaces it)")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((output / "report.json").read_text())["options"]["splits"]:
            return
    raise InputError(f"{output}: was not made by this command and is not replaced (expected a new folder)")


def _put_in_place(building: Path, output: Path) -> None:
    """`building` becomes `output`; what was there before goes only once the new folder has its place."""
    replaced = output.with_name(f"{building.name}.replaced")
    if output.exists():
        os.replace(output, replaced)
    os.replace(building, output)
    shutil.rmtree(replaced, ignore_errors=True)
