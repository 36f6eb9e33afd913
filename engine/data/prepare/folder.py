"""A folder of questions that trains, whatever it is made of: images stored once, rows, a report, whole or not at all.

DIR/train.json, DIR/test.json    the rows: image, problem, solution, modality, question_type, original (the image's own name)
DIR/images/train/<hash>.png      training images, resized (bicubic, RGB) or as they are; the hash is of the original's pixels
DIR/images/test/<hash>.<ext>     test images, mostly as they are but upright, since the papers evaluate on originals
DIR/report.json                  what was left out and why, and which test images also occur in train

An image can stand in both parts: under the same name, or under another with the same pixels. Both are found.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from engine.data.formats.text import MAX_BYTES
from engine.data.images import is_turned
from engine.data.questions import QuestionSet
from engine.data.rows import SkippedRow
from engine.errors import InputError
from engine.files import read_bounded, write_json, write_whole
from engine.progress import progress

CHUNK = 256  # images in flight: bounds the memory of those encoded but not yet written

COUNTED = ("missing_images", "bad_rows", "leaked_rows")


def prepare_folder(options: Any, source: str, build: Callable[[Path], dict], counted: Sequence[str] = COUNTED) -> dict:
    """Let `build(folder)` fill a folder beside `options.output`, put it there whole, and return the headline numbers.

    `options` is a dataclass with `output`, `overwrite`, and the option named `source`, which says what the folder is made of.
    `build` returns the report (see `finish`); the headline has the lengths of its lists that `counted` names. A folder that is
    there already is replaced only with `options.overwrite`, and only where its own report has the option `source`: InputError
    otherwise.
    """
    output = Path(os.path.abspath(options.output))
    _refuse_to_lose(output, options.overwrite, source)
    _refuse_to_replace_inputs(output, options)
    building = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{building.parent}: cannot hold the output folder ({error.strerror})") from None
    try:
        report = {"options": asdict(options), **build(building)}
        write_json(building / "report.json", report)
        _put_in_place(building, output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    headline = count_report(report, output, counted)
    _log(headline, options)
    return headline


def count_report(report: dict, output: Path, counted: Sequence[str]) -> dict:
    """The headline numbers of the folder `output`: rows of its parts, and the lengths of its report's lists."""
    rows = {f"{split}_rows": report["rows"][split] for split in ("train", "test")}
    return rows | {key: len(report[key]) for key in counted} | {"output": str(output)}


def _log(headline: dict, options: Any) -> None:
    """The headline in words."""
    log, report = logging.getLogger(__name__), f"{headline['output']}/report.json"
    log.info("%(train_rows)d train rows and %(test_rows)d test rows in %(output)s", headline)
    if headline["bad_rows"] or headline["missing_images"]:
        log.info("%d rows left out, %d images missing; all in %s", headline["bad_rows"], headline["missing_images"], report)
    if headline.get("leaked_rows"):
        kept = "its train rows were dropped" if options.drop_leaked else "--drop_leaked takes it out of train"
        log.info("%d test rows show an image that train shows too; %s", headline["leaked_rows"], kept)


def write_images(
    folder: Path, split: str, questions: QuestionSet, original: Callable[[Any], str], size: int | None = None
) -> list[dict]:
    """Write the images of one part, at `size` x `size` pixels or as they are; returns its rows, which name images in `folder`.

    `original(handle)` is the name that an image had before.
    """
    names = _write_images(folder, split, questions, size)
    return [
        {"image": [names[handle.key] for handle in handles], "original": [original(handle) for handle in handles], **record}
        for record, handles in zip(questions.records, questions.handles, strict=True)
    ]


def finish(
    folder: Path,
    rows: dict[str, list[dict]],
    bad: Sequence[SkippedRow],
    *,
    origin: str,
    root: Path,
    kind: str,
    drop_leaked: bool,
) -> dict:
    """Find leaks, drop them from train if asked, write `rows` (of train, test or both) and return the report.

    `bad` are the lines of bad rows, whose images start at `root`; `origin` is what an error calls the rows' source, `kind` the
    label that the report counts them by.
    """
    train, test = rows.get("train", []), rows.get("test", [])
    leaked = _find_leaks(train, test)
    if drop_leaked and leaked:
        rows["train"] = _drop_leaked(folder, train, test)
    for split, kept in rows.items():
        if not kept:
            raise InputError(f"{origin}: no {split} row is left (all use images that also occur in test)")
        write_json(folder / f"{split}.json", [_published_row(row) for row in kept])
    return {
        "rows": {split: len(rows.get(split, [])) for split in ("train", "test")},
        "names": {split: dict(Counter(row[kind] for row in rows.get(split, []))) for split in ("train", "test")},
        "missing_images": sorted({relative_name(line.missing_image, root) for line in bad if line.missing_image}),
        "bad_rows": list(bad),
        "leaked_rows": leaked,
        "dropped_train_rows": len(train) - len(rows.get("train", [])),
    }


def relative_name(path: str, root: Path) -> str:
    """The path from `root`, with slashes on every system."""
    return Path(os.path.relpath(path, root)).as_posix()


def _published_row(row: dict) -> dict:
    """The row as the file keeps it: lists of one image as that image, no empty labels."""
    image, original = (row[key][0] if len(row[key]) == 1 else row[key] for key in ("image", "original"))
    labels = {key: row[key] for key in ("modality", "question_type") if row[key]}
    return {"image": image, "problem": row["problem"], "solution": row["solution"], **labels, "original": original}


def _write_images(folder: Path, split: str, questions: QuestionSet, size: int | None) -> dict[str, str]:
    """Write each distinct image once; {key: name within `folder`}. Images with the same pixels share a file."""
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    handles = list({handle.key: handle for images in questions.handles for handle in images}.values())
    names = {}
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        progress(total=len(handles), desc=f"{split} images", unit="image") as bar,
    ):
        for start in range(0, len(handles), CHUNK):
            chunk = handles[start : start + CHUNK]
            for handle, (name, data) in zip(chunk, pool.map(lambda handle: _encode(handle, size), chunk), strict=True):
                names[handle.key] = f"images/{split}/{name}"
                if not (folder / names[handle.key]).exists():
                    write_whole(folder / names[handle.key], data)
                bar.update()
    return names


def _encode(handle: Any, size: int | None) -> tuple[str, bytes]:
    """(file name, content): the file itself if it is upright, or its image, at size x size, as PNG; named after its pixels."""
    image = handle.open()
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]
    if size is None:
        name, data = handle.read()
        if is_turned(data):
            return _as_png(digest, image)
        suffix = Path(name).suffix.lower()
        return f"{digest}{suffix if suffix[1:].isalnum() else ''}", data
    return _as_png(digest, image.resize((size, size), Image.Resampling.BICUBIC))


def _as_png(digest: str, image: Image.Image) -> tuple[str, bytes]:
    content = io.BytesIO()
    image.save(content, "PNG")
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


def _drop_leaked(folder: Path, train: list[dict], test: list[dict]) -> list[dict]:
    """The train rows none of whose images occurs in test; removes the images that no row needs any more."""
    paths = {path for row in test for path in row["original"]}
    pixels = {_pixels(name) for row in test for name in row["image"]}
    kept = [row for row in train if not (paths & set(row["original"]) or pixels & set(map(_pixels, row["image"])))]
    for name in {name for row in train for name in row["image"]} - {name for row in kept for name in row["image"]}:
        (folder / name).unlink()
    return kept


def _refuse_to_replace_inputs(output: Path, options: Any) -> None:
    """InputError if a file or folder that the options name lies in `output`, or is it, under whatever name."""
    place = Path(os.path.realpath(output))
    for name, value in asdict(options).items():
        for path in value if isinstance(value, list) else [value]:
            if name == "output" or not isinstance(path, str) or not path or "\0" in path or not os.path.exists(path):
                continue
            if Path(os.path.realpath(path)).is_relative_to(place):
                raise InputError(f"--output {output}: holds what --{name} names, {path} (expected another folder)")


def _refuse_to_lose(output: Path, overwrite: bool, source: str) -> None:
    """InputError if `output` holds something that may not be replaced."""
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{output}: exists already (--overwrite replaces it)")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(read_bounded(output / "report.json", MAX_BYTES))["options"][source]:
            return
    raise InputError(f"{output}: was not made by this command and is not replaced (expected a new folder)")


def _put_in_place(building: Path, output: Path) -> None:
    """`building` becomes `output`; what was there before goes only once the new folder has its place."""
    replaced = output.with_name(f"{building.name}.replaced")
    if output.exists():
        os.replace(output, replaced)
    os.replace(building, output)
    shutil.rmtree(replaced, ignore_errors=True)
