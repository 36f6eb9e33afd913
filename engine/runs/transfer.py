"""Trained on one part, tested on all: what evaluation files in a folder of runs say, as matrices (Med-R1's three figures).

A run is a folder below the root whose path names the part that its model was trained on, `think/CT`, `VQA_Dermo` or
`nothink/Lesion Grading`: the first folder that names one decides. Whether it reasons is what a folder says (`nothink`, `no-think`),
or the template in its evaluation file, or else it does. In it are read, the first of these that is there:

    evaluation_summary.json     of `recipes.medr1_batch_eval`, or of AdvMed-R1's script: the clean accuracies
    evaluation.json, evaluation_clean.json, evaluation_after.json     ours: the shares by modality and by question type
    <part>.json, <part>_test.json, <part>_clean.json     Med-R1's, AdvMed-R1's: {"accuracy": percent, "results": [...]}
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.split_names import KINDS, part_of
from engine.errors import InputError
from engine.files import read_bounded, visible_files

STYLES = ("think", "nothink")
OURS = ("evaluation.json", "evaluation_clean.json", "evaluation_after.json")
LARGEST = 1 << 30  # bytes of an evaluation file: 100,000 answers of 10,000 bytes
_NOTHINK = re.compile(r"no[-_ ]?think", re.IGNORECASE)


@dataclass
class Matrix:
    """Accuracies as fractions: `cells[trained, tested]`, of the parts of `kind` (modality or question_type) in published order.

    `files[trained, tested]` is where a cell was read.
    """

    kind: str
    style: str
    cells: dict[tuple[str, str], float] = field(default_factory=dict)
    files: dict[tuple[str, str], Path] = field(default_factory=dict)

    @property
    def trained(self) -> list[str]:
        return [name for name in KINDS[self.kind] if any(name == trained for trained, _ in self.cells)]

    @property
    def tested(self) -> list[str]:
        return [name for name in KINDS[self.kind] if any(name == tested for _, tested in self.cells)]

    def mean(self, own: bool) -> float | None:
        """The mean accuracy on the part trained on, or on the others; None without such a cell."""
        found = [value for (trained, tested), value in self.cells.items() if (trained == tested) == own]
        return sum(found) / len(found) if found else None

    def minus(self, other: "Matrix") -> "Matrix":
        """The differences of the cells that both have."""
        both = {place: value - other.cells[place] for place, value in self.cells.items() if place in other.cells}
        return Matrix(self.kind, f"{self.style} minus {other.style}", both)


def read_matrices(root: Path) -> list[Matrix]:
    """The matrices of every kind and style that runs below `root` have cells of.

    InputError if there is none, if a file cannot be read, or if two files speak of one cell.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder (expected runs, each in a folder named by what it was trained on)")
    matrices = {(kind, style): Matrix(kind, style) for kind in KINDS for style in STYLES}
    for cell in (cell for folder in _folders(root) for cell in _cells_below(folder, root, None)):
        matrix, place = matrices[cell.kind, cell.style], (cell.trained, cell.tested)
        if place in matrix.cells:
            raise InputError(f"{cell.path}: {cell.tested} of a model trained on {cell.trained} stands in {matrix.files[place]} too")
        matrix.cells[place], matrix.files[place] = cell.accuracy, cell.path
    found = [matrix for matrix in matrices.values() if matrix.cells]
    if not found:
        raise InputError(
            f"{root}: no evaluation in a folder named by what a model was trained on (expected such as think/CT/evaluation.json; "
            f"names: {', '.join(name for names in KINDS.values() for name in names if name != 'unknown')})"
        )
    return found


@dataclass(frozen=True)
class _Cell:
    kind: str
    style: str
    trained: str
    tested: str
    accuracy: float
    path: Path


def _cells_below(folder: Path, root: Path, part: tuple[str, str] | None) -> Iterator[_Cell]:
    """The cells of the run that a folder is, or of the runs in it; `part`: what folders around it name, its kind and name."""
    part = part or part_of(folder.name)
    found = list(_accuracies(folder)) if part else []
    for path, template, (kind, tested), accuracy in found:
        if part and kind == part[0]:  # a modality's model asked by question type belongs to neither figure
            hints = [*folder.relative_to(root).parts, template]
            style = "nothink" if any(map(_NOTHINK.search, hints)) else "think"
            yield _Cell(kind, style, part[1], tested, _fraction(path, accuracy), path)
    if not found:
        for inside in _folders(folder):
            yield from _cells_below(inside, root, part)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and not path.name.startswith("."))


def _accuracies(folder: Path) -> Iterator[tuple[Path, str, tuple[str, str], Any]]:
    """(file, template or nothing, (kind, part) that was tested, accuracy in percent) of what a run's folder holds."""
    summary = folder / "evaluation_summary.json"
    if summary.is_file():
        for entry in _list(_read(summary), "results", summary):
            part = part_of(entry.get("name")) if isinstance(entry, dict) else None
            if part:
                yield summary, "", part, _at(entry, "attacks", "clean", "accuracy")
        return
    for path in (folder / name for name in OURS if (folder / name).is_file()):
        content = _read(path)
        for kind in KINDS:
            shares = _at(content, "scores", kind)
            for name, share in shares.items() if isinstance(shares, dict) else ():
                if part := part_of(name):
                    yield path, str(content.get("template")), part, _percent(_at(share, "accuracy"))
        return
    for path in visible_files(folder, "*.json"):
        if part := part_of(path.stem):
            content = _read(path)
            _list(content, "results", path)
            yield path, "", part, content.get("accuracy")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bounded(path, LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an evaluation, a JSON object with its accuracy")
    return content


def _list(content: dict[str, Any], key: str, path: Path) -> list:
    if not isinstance(content.get(key), list):
        raise InputError(f"{path}: no list {key!r} in it (expected an evaluation as Med-R1 or AdvMed-R1 write it)")
    return content[key]


def _at(content: Any, *keys: str) -> Any:
    """What stands under the keys, one inside the other; None where one is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _percent(fraction: Any) -> Any:
    return 100 * fraction if type(fraction) in (int, float) else fraction


def _fraction(path: Path, percent: Any) -> float:
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        raise InputError(f"{path}: an accuracy of {percent!r} (expected a number of percent, 0 to 100)")
    return percent / 100
