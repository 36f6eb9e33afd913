"""MeCoVQA's questions (MedPLIB, arXiv:2412.09278): about a whole image, about a region of it, and for a mask.

A file is a JSON list of `{"image": "images/NAME.png", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}`,
also with `id` and `answer_type`; see `engine.data.mecovqa.tags` for the texts. Paths start at the folder that holds images/ and
masks/: `image_root`, by default that of the file or the one above it. A name may lack its `.png`. `[i]` gives

    images: [PIL RGB], [] for a row without image         image_id: str, the image's file; "" without one
    question: str, to be read; a region is `[region]`     question_parts: [{"type": "text", "text": str} or {"type": "region"}]
    region: PIL L of the image's size, 0 or 255, or None  region_id: str, its file from the root, or None
    answer: str, with `<SEG>`, without `<mask>`           masks: [PIL L as region], one for each `<SEG>`
    mask_ids: [str], their files from the root            mask_classes: [str or None], their classes, where SA-Med2D's mapping
                                                          lies in the root and knows them
    kind: complex, region, grounding or caption           answer_type: "closed" or "open", None where a mask is the answer
    modality: str, SA-Med2D's prefix (ct_00), or None     history: [{"role", "content"}], the turns before, text alone
    row: int, counted from 0     source: str, the file it stands in     turn: int, which question of its conversation

A conversation of several questions is as many rows; none but the last may have a region or a mask. What becomes of a bad row: see
`engine.data.rows`.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.data.formats.folders import bare_name
from engine.data.formats.json_rows import read_json_rows
from engine.data.image_check import find_bad_images
from engine.data.images import EXPECTED
from engine.data.masks.chosen import check_mask_values
from engine.data.mecovqa.files import RowFiles, find_file
from engine.data.mecovqa.samed2d import CLASSES, class_of, read_classes, read_name
from engine.data.mecovqa.tags import read_answer, read_question
from engine.data.rows import BadRow, BadRows, Rows, evenly_spread
from engine.errors import InputError
from engine.files import visible_files

KINDS = ("complex", "region", "grounding", "caption")
TURNS = '[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'
FORM = f'a JSON list of {{"image": "images/NAME.png", "conversations": {TURNS}}}'
NAMES = "MeCoVQA*.json"
MASK_VALUES = "nonzero"  # SA-Med2D's masks are 0 and 1, or 0 and 255
Classes = dict[str, dict[str, str]]  # as `read_classes` gives them
Turn = tuple[dict[str, Any], list[str], str | None]  # a record without its files, the names of masks, that of a region


class MeCoVQA(Rows[RowFiles]):
    """Checked rows, each with the files it names."""

    def open(self, handle: RowFiles) -> dict[str, Any]:
        return handle.open()


def load_mecovqa(
    source: str | Path | Sequence[str | Path],
    *,
    image_root: str | Path | None = None,
    split: str = "train",
    kinds: Collection[str] | None = None,
    on_bad_row: str = "error",
    limit: int | None = None,
    first: int | None = None,
    mask_values: str = MASK_VALUES,
) -> MeCoVQA:
    """The rows of one or several files or folders, one after the other.

    Of a folder these are the files MeCoVQA*.json in its folder `split`. `kinds`: the only ones to be read, of KINDS. `limit` takes
    only so many rows, evenly spread, and `first` only the first so many, as published code does; either counts rows before any are
    skipped. `mask_values` says which values of a mask count (see
    `engine.data.masks.chosen`). InputError for a bad row, a file that cannot be read, and where no row is left.
    """
    bad = BadRows(on_bad_row)
    check_mask_values(mask_values)
    paths = [file for path in _listed(source) for file in split_files(Path(path), split)]
    turns: list[tuple[Path, int, list[Turn] | BadRow]] = []
    for path in paths:
        turns += [(path, index, _read_item(row, path)) for index, row in enumerate(read_json_rows(path, FORM))]
    asked = [(path, index, read) for path, index, item in turns for read in _wanted(item, kinds)]
    rows: list[tuple[dict, RowFiles]] = []
    roots = {path: root_of(path, image_root) for path in paths}
    classes = {root: classes_in(root) for root in roots.values()}
    asked = asked[:first] if first is not None else [asked[i] for i in evenly_spread(len(asked), limit)]
    for path, index, read in asked:
        try:
            rows.append(_with_files(read, index, path, roots[path], classes[roots[path]], mask_values))
        except BadRow as error:
            bad.add(path, index, error)
    return collected(rows, bad, roots, f"{' or '.join(kinds or KINDS)} rows")


def split_files(path: Path, split: str) -> list[Path]:
    """The file itself, or those of a folder's split."""
    if not path.is_dir():
        return [path]
    found = visible_files(path / split, NAMES) if (path / split).is_dir() else []
    if not found:
        raise InputError(f"{path}: no {split}/{NAMES} (expected a file, or a folder with such files: {FORM})")
    return found


def root_of(path: Path, image_root: str | Path | None) -> Path:
    """Where the paths of a file start: `image_root`, else the file's folder or the one above it, whichever has images/."""
    if image_root is not None:
        if not Path(image_root).is_dir():
            raise InputError(f"{image_root}: no such folder (expected the one that holds images/ and masks/)")
        return Path(os.path.abspath(image_root))
    folder = Path(os.path.abspath(path)).parent
    return next((place for place in (folder, folder.parent) if (place / "images").is_dir()), folder)


def collected(rows: list[tuple[dict, RowFiles]], bad: BadRows, roots: Mapping[Path, Path], what: str) -> MeCoVQA:
    """The rows whose files open; `bad` meets the others. `roots`: {file of rows: where its paths start}.

    InputError where no row is left.
    """
    distinct, (root, *_) = {files.key: files for _, files in rows}, roots.values()
    reasons = find_bad_images(list(distinct.values()), root, stop_at_first=bad.stops)
    good = []
    for record, files in rows:
        if files.key in reasons:
            expected = f"an image and masks of its shape, each {EXPECTED}"
            bad.add(record["source"], record["row"], BadRow(reasons[files.key], expected))
        else:
            good.append((record, files))
    skipped = bad.lines()
    if skipped and not good:
        raise InputError(f"all {len(skipped)} rows are bad; the first: {skipped[0]}")
    if not good:
        raise InputError(f"{', '.join(map(str, roots))}: no {what} in it (expected at least one)")
    return MeCoVQA([record for record, _ in good], [files for _, files in good], skipped)


def _listed(source: str | Path | Sequence[str | Path]) -> list[str | Path]:
    paths = [source] if isinstance(source, str | Path) else list(source)
    if not paths:
        raise InputError("no data set given (expected at least one file or folder)")
    return paths


def _wanted(item: list[Turn] | BadRow, kinds: Collection[str] | None) -> Iterator[Turn | BadRow]:
    """The questions of an item that are of `kinds`, or why it cannot be used."""
    if isinstance(item, BadRow):
        yield item
    else:
        yield from (turn for turn in item if kinds is None or turn[0]["kind"] in kinds)


def _read_item(row: Any, path: Path) -> list[Turn] | BadRow:
    """The questions of a conversation, their files not looked for."""
    try:
        return _read_turns(row, path)
    except BadRow as error:
        return error


def _read_turns(row: Any, path: Path) -> list[Turn]:
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", FORM)
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2 or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("no conversations", "a list of turns, human and gpt in turn")
    found: list[Turn] = []
    history: list[dict[str, str]] = []
    for place, turn in enumerate(turns):
        speaker = ("human", "gpt")[place % 2]
        if turn.get("from") != speaker:
            raise BadRow(f"turn {place} is from {str(turn.get('from'))[:40]!r}", f"{speaker}: human and gpt in turn")
    for place, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        question, (answer, masks) = read_question(asked.get("value")), read_answer(answered.get("value"))
        if question.images > (1 if place == 0 else 0):
            raise BadRow(f"<image> {question.images} times in question {place}", "once, in the first question")
        if found and (found[-1][1] or found[-1][2]):
            raise BadRow(f"question {place} comes after a region or a mask", "each such question in a conversation of its own")
        if row.get("image") is None and (question.images or question.region or masks):
            raise BadRow("missing key 'image'", "images/NAME.png, or a text without <image>, region and mask")
        kind = "grounding" if masks else "region" if question.region else "complex"
        record = {
            "image": row.get("image"),
            "question": question.text,
            "question_parts": question.parts,
            "answer": answer,
            "kind": kind,
            "answer_type": None if masks else _answer_type(row.get("answer_type"), answer, path),
            "history": list(history),
            "turn": place,
        }
        found.append((record, masks, question.region))
        history += [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}]
    return found


def _answer_type(given: Any, answer: str, path: Path) -> str:
    """The row's own word, or that of the file's name; else yes and no are closed answers, and all others open."""
    if isinstance(given, str) and given.strip().lower() in ("closed", "open"):
        return given.strip().lower()
    closed = "closed" in bare_name(path).lower() or answer.lower().strip(" .") in ("yes", "no")
    return "closed" if closed else "open"


def _with_files(
    read: Turn | BadRow, index: int, path: Path, root: Path, classes: Classes, mask_values: str
) -> tuple[dict, RowFiles]:
    """(record, its files); BadRow if one is not there."""
    if isinstance(read, BadRow):
        raise read
    record, masks, region = read
    name = record["image"]
    files = RowFiles(
        None if name is None else find_file(root, name, "image"),
        tuple(find_file(root, mask, "mask") for mask in masks),
        None if region is None else find_file(root, region, "mask"),
        mask_values,
    )
    about = {key: value for key, value in record.items() if key != "image"}
    return about | about_files(files, root, classes) | {"row": index, "source": str(path)}, files


def classes_in(root: Path) -> Classes:
    """SA-Med2D's mapping, if it lies there."""
    path = root / CLASSES
    return read_classes(path) if path.is_file() else {}


def about_files(files: RowFiles, root: Path, classes: Classes) -> dict[str, Any]:
    """What the names of a row's files say."""
    named = None if files.image is None else read_name(files.image)
    masks = [read_name(mask) for mask in files.masks]
    return {
        "image_id": "" if files.image is None else str(files.image),
        "mask_ids": [mask.relative_to(root).as_posix() for mask in files.masks],
        "mask_classes": [None if mask is None else class_of(mask, classes) for mask in masks],
        "region_id": None if files.region is None else files.region.relative_to(root).as_posix(),
        "modality": None if named is None else named.modality,
    }
