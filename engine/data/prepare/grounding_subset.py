"""The first rows of MeCoVQA's grounding file whose image and masks are there, with those files, as a folder of its own.

    OUTPUT/train/MeCoVQA-Grounding.json     the rows that were kept (of a file in a folder test/: OUTPUT/test/...)
    OUTPUT/images/, OUTPUT/masks/           their files, each at its own path from the root
    OUTPUT/missing_files_log.txt            a line for each file that is not there

Uni-MedVLM's create_grounding_subset.py copies to images/ and masks/ by the last part of a path, which is the same for its data; a
deeper path stays what it was here, so that the rows still find it. A name without `.png` is written with it.
"""

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.formats.json_rows import read_json_rows
from engine.data.mecovqa.files import find_file
from engine.data.mecovqa.rows import FORM, root_of
from engine.data.rows import BadRow
from engine.errors import InputError
from engine.files import as_json, refuse_overwriting, write_whole
from engine.progress import progress

FIRST = 15_000  # of the published script
LOG = "missing_files_log.txt"
_MASK = re.compile(r"(?<=<mask>)[^<>]*(?=</mask>)")


@dataclass
class Subset:
    """`rows` as they are to be written, `files` {path from the root: file}; `log`: a line for each file that is not there.

    `total`: rows that were looked at; `fixed_names`: names that got their `.png`. Rows without image, answer or mask tag are
    skipped, and have no line.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    total: int = 0
    fixed_names: int = 0

    def counts(self) -> dict[str, int]:
        """The totals that the published script prints, and ours."""
        missing = {f"missing_{kind}s": sum(line.startswith(kind.capitalize()) for line in self.log) for kind in ("image", "mask")}
        kept = {"total": self.total, "kept": len(self.rows), "skipped": self.total - len(self.rows)}
        return kept | missing | {"fixed_names": self.fixed_names, "files": len(self.files)}


def find_subset(path: str | Path, image_root: str | Path | None = None, first: int = FIRST) -> Subset:
    """The first rows of the file, and which of them can be used. InputError if it cannot be read."""
    path = Path(path)
    root, subset = root_of(path, image_root), Subset()
    rows = read_json_rows(path, FORM)[:first]
    for row in progress(rows, desc="looking for files", unit="row", delay=2):
        subset.total += 1
        answer = _answer_of(row)
        masks = _MASK.findall(answer or "")
        if answer is None or not masks or not row.get("image"):
            continue
        places = [_find(root, row["image"], "image", subset), *(_find(root, mask, "mask", subset) for mask in masks)]
        if all(place is not None for place in places):
            image, *found = [place for place in places if place is not None]
            _keep(row, masks, root, image, found, subset)
    return subset


def write_subset(subset: Subset, source: str | Path, output: str | Path) -> dict[str, Any]:
    """Copy the files that are not there yet, then write log and rows, and return the headline numbers.

    InputError where that cannot be done.
    """
    source, output = Path(source), Path(os.path.abspath(output))
    written = output / ("test" if source.parent.name == "test" else "train") / source.name
    refuse_overwriting({"--output": written}, {"--data": source})
    copied = 0
    try:
        for name, file in progress(subset.files.items(), desc="copying", unit="file", delay=2):
            copied += _copy(file, output / name)
        write_whole(output / LOG, "".join(f"{line}\n" for line in subset.log))
        write_whole(written, as_json(subset.rows))
    except OSError as error:
        raise InputError(f"{error.filename or output}: cannot be written ({error.strerror})") from None
    return {**subset.counts(), "copied": copied, "data": str(written), "log": str(output / LOG), "output": str(output)}


def _answer_of(row: Any) -> str | None:
    """What the second turn says, where there is one."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    second = turns[1] if isinstance(turns, list) and len(turns) > 1 else None
    value = second.get("value") if isinstance(second, dict) else None
    return value if isinstance(value, str) else None


def _find(root: Path, name: Any, kind: str, subset: Subset) -> Path | None:
    """The file; None, and a line in the log, where it is not there or outside of the root."""
    try:
        return find_file(root, name.strip() if isinstance(name, str) else name, kind)
    except BadRow as error:
        why = "not found" if error.missing_image else "refused"
        subset.log.append(f"{kind.capitalize()} {why}: {' '.join(str(name)[:300].split())}")
        return None


def _keep(row: dict, masks: Sequence[str], root: Path, image: Path, found: Sequence[Path], subset: Subset) -> None:
    """Add a row, with the paths of its files from the root in it."""
    names = [path.relative_to(root).as_posix() for path in (image, *found)]
    given = [row["image"], *masks]
    subset.fixed_names += sum(name == f"{old.strip()}.png" for name, old in zip(names, given, strict=True))
    subset.files |= dict(zip(names, (image, *found), strict=True))
    rest = iter(names[1:])
    second = {**row["conversations"][1], "value": _MASK.sub(lambda _: next(rest), row["conversations"][1]["value"])}
    turns = [row["conversations"][0], second, *row["conversations"][2:]]
    subset.rows.append({**row, "image": names[0], "conversations": turns})


def _copy(file: Path, to: Path) -> bool:
    """Copy content and times in one step, unless there is such a file already."""
    if to.exists():
        return False
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{secrets.token_hex(8)}.part")
    try:
        shutil.copy2(file, part)
        os.replace(part, to)
    except OSError as error:
        error.filename, error.filename2 = str(to), None
        raise
    finally:
        part.unlink(missing_ok=True)
    return True
