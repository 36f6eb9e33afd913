"""Captions to align image and language (Uni-MedVLM, stage 1): a line of JSON `{"id", "image", "caption", "source"}` an image.

`[i]` gives the keys of `engine.data.mecovqa.rows`, of the kind caption: the caption without its `<image>` is the answer, the
question is empty; `origin` is the line's own `source`, or None.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.formats.json_rows import read_json_rows
from engine.data.formats.text import is_unicode
from engine.data.mecovqa.files import RowFiles, find_file
from engine.data.mecovqa.rows import MeCoVQA, about_files, collected, root_of
from engine.data.mecovqa.tags import MAX_TEXT, without_image
from engine.data.rows import BadRow, BadRows, evenly_spread
from engine.errors import InputError

FORM = '{"image": "images/NAME.png", "caption": "<image>\\n..."}, a line of JSON each'


def load_captions(
    source: str | Path | Sequence[str | Path],
    *,
    image_root: str | Path | None = None,
    split: str = "train",
    on_bad_row: str = "error",
    limit: int | None = None,
) -> MeCoVQA:
    """The captions of one or several files; of a folder captions.jsonl, or for the split test captions_test.jsonl.

    Paths of images start at `image_root`, by default the folder of each file or the one above it that has images/. InputError as
    `load_mecovqa`.
    """
    bad = BadRows(on_bad_row)
    paths = [file_of_captions(Path(path), split) for path in ([source] if isinstance(source, str | Path) else source)]
    if not paths:
        raise InputError("no data set given (expected at least one file or folder)")
    asked = [(path, index, row) for path in paths for index, row in enumerate(read_json_rows(path, FORM))]
    roots = {path: root_of(path, image_root) for path in paths}
    rows: list[tuple[dict, RowFiles]] = []
    for path, index, row in (asked[i] for i in evenly_spread(len(asked), limit)):
        try:
            rows.append(_check_caption(row, index, path, roots[path]))
        except BadRow as error:
            bad.add(path, index, error)
    return collected(rows, bad, roots, "captions")


def file_of_captions(path: Path, split: str) -> Path:
    """The file itself, or that of a folder's split."""
    name = "captions.jsonl" if split == "train" else f"captions_{split}.jsonl"
    return path / name if path.is_dir() else path


def _check_caption(row: Any, index: int, path: Path, root: Path) -> tuple[dict, RowFiles]:
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", FORM)
    caption = row.get("caption")
    if not isinstance(caption, str) or len(caption) > MAX_TEXT or not without_image(caption):
        raise BadRow("no caption", f"text of at most {MAX_TEXT:,} characters under 'caption'")
    if not is_unicode(caption):
        raise BadRow("caption has half a character", "Unicode text")
    files = RowFiles(find_file(root, row.get("image"), "image"))
    origin = row.get("source")
    return {
        "question": "",
        "question_parts": [],
        "answer": without_image(caption),
        "kind": "caption",
        "answer_type": None,
        "history": [],
        "turn": 0,
        "origin": origin if isinstance(origin, str) else None,
        **about_files(files, root, {}),
        "row": index,
        "source": str(path),
    }, files
