"""Multiple-choice questions about images: every row is checked when the set is loaded, images open when a row is asked for.

A row of a file has `image` (a path or a list of paths), `problem` (the question, options inline) and `solution` (`<answer> C
</answer>` or a bare letter), and may have `options` (a list), `modality`, `question_type` or `subset`. In place of problem and
solution it may have `question`, `options` and `answer` (an option's text), as HuatuoGPT-Vision's collection. `[i]` gives

    images: list of PIL RGB      image_id: str, the image file(s)       problem, solution: str, as in the file
    answer: str, the letter      options: {"A": "CT", "B": ...}          modality, question_type: str or None
    row: int, counted from 0     source: str, the file it stands in

A bad row is one line, `FILE: row N: reason (expected ...; rows count from 0)`: an InputError, or an entry of `.skipped`.
"""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from engine.data.image_check import find_bad_images
from engine.data.images import EXPECTED, MISSING
from engine.data.options import LETTERS, list_options, match_option, parse_options
from engine.data.sources import ImageFile, Source, read_source
from engine.data.split_names import short_modality
from engine.errors import InputError

REQUIRED = ("image", "problem", "solution")


class SkippedRow(str):
    """The line of a bad row. `missing_image` is the image that is not there, if that is the reason."""

    missing_image: str | None = None


class QuestionSet(Dataset):
    """Checked questions. `images[i]` are the handles of row i's images: anything whose `open()` gives a PIL image."""

    def __init__(self, records: Sequence[dict], images: Sequence[Sequence], skipped: Sequence[SkippedRow] = ()):
        if len(records) != len(images):
            raise ValueError(f"{len(records)} records but images for {len(images)}")
        self.records, self.images, self.skipped = list(records), list(images), list(skipped)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """The row with its images opened; ImageError if a file has changed or gone since it was checked."""
        return {**self.records[index], "images": [image.open() for image in self.images[index]]}

    def record(self, index: int) -> dict:
        """The row without its images: no file is touched."""
        return dict(self.records[index])

    def select(self, indices: Iterable[int]) -> "QuestionSet":
        """The rows of `indices`, in their order."""
        chosen = list(indices)
        return QuestionSet([self.records[i] for i in chosen], [self.images[i] for i in chosen], self.skipped)


def load_questions(
    source: str | Path | Source | Sequence[str | Path | Source],
    *,
    image_root: str | Path | None = None,
    split: str = "train",
    on_bad_row: str = "error",
    limit: int | None = None,
    modalities: Collection[str] | None = None,
    check_row: Callable[[int, Any, Source], tuple[dict, list]] | None = None,
) -> QuestionSet:
    """Questions of one or several files or folders (or of a `Source`), one after the other.

    `split` chooses within folders that hold several. `image_root` is where relative image paths start (default: the folder of
    each file); no path may leave it. `modalities` (short names, see `engine.data.split_names`) are the only ones read. `limit`
    reads only the first so many rows of these, before any are skipped. InputError: see above. `check_row(index, row, source)`
    makes other rows than multiple-choice questions of what the file holds: (record, image handles), or it raises `BadRow`.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is 'error' or 'skip', not {on_bad_row!r}")
    paths = [source] if isinstance(source, str | Path | Source) else list(source)
    if not paths:
        raise InputError("no data set given (expected at least one file or folder)")
    records, images, skipped, left = [], [], [], limit
    for path in paths:
        if left == 0:
            break
        found = path if isinstance(path, Source) else read_source(path, split, image_root)
        rows = list(enumerate(found.rows))
        if modalities is not None:
            rows = [(index, row) for index, row in rows if short_modality(_labels(row, found)["modality"]) in modalities]
        rows = rows[:left]
        good, bad = _check_rows(rows, found, check_row or check_question, stop_at_first=on_bad_row == "error")
        if bad and on_bad_row == "error":
            raise InputError(bad[0])
        records += [record for record, _ in good]
        images += [handles for _, handles in good]
        skipped += bad
        left = None if left is None else left - len(rows)
    if skipped and not records:
        raise InputError(f"all {len(skipped)} rows are bad; the first: {skipped[0]}")
    if modalities and not records:
        names = ", ".join(str(path.name if isinstance(path, Source) else path) for path in paths)
        raise InputError(f"{names}: no row about {' or '.join(modalities)} (expected such a `modality` or `subset`)")
    return QuestionSet(records, images, skipped)


def _check_rows(
    rows: list[tuple[int, Any]], source: Source, check_row: Callable, stop_at_first: bool
) -> tuple[list[tuple[dict, list]], list[SkippedRow]]:
    """Good rows as (record, image handles), and the lines of the bad ones in row order; the text is checked before any image."""
    good, bad = [], {}
    for index, row in rows:
        try:
            good.append(check_row(index, row, source))
        except BadRow as error:
            bad[index] = _line(source, index, *error.args)
            if stop_at_first:
                return [], list(bad.values())
    distinct = {handle.key: handle for _, handles in good for handle in handles}
    reasons = find_bad_images(list(distinct.values()), source.root, stop_at_first)
    kept = []
    for record, handles in good:
        broken = next((handle.key for handle in handles if handle.key in reasons), None)
        if broken is None:
            kept.append((record, handles))
        else:
            name = "" if source.stored else f" {os.path.relpath(broken, source.root)!r}"
            line = _line(source, record["row"], f"image{name}: {reasons[broken]}", EXPECTED)
            line.missing_image = broken if reasons[broken] == MISSING else None
            bad[record["row"]] = line
    return kept, [bad[index] for index in sorted(bad)]


class BadRow(Exception):
    """Why a row cannot be used: (reason, what was expected)."""


def _line(source: Source, index: int, reason: str, expected: str) -> SkippedRow:
    return SkippedRow(f"{source.name}: row {index}: {reason} (expected {expected}; rows count from 0)")


def check_question(index: int, row, source: Source) -> tuple[dict, list]:
    """A raw row -> (record, image handles); BadRow if it cannot be used."""
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", f"an object with the keys {', '.join(REQUIRED)}")
    if row.get("problem") is None and isinstance(row.get("question"), str):
        row = _with_problem(row)
    for key in REQUIRED:
        if row.get(key) is None and not (key == "image" and source.stored):
            raise BadRow(f"missing key {key!r}", f"the keys {', '.join(REQUIRED)}")
    problem, solution = row["problem"], row["solution"]
    for key, text in (("problem", problem), ("solution", solution)):
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"empty {key}" if isinstance(text, str) else f"{key} is not text", f"{key} to be text")
    options, problem = _options_of(row, problem)
    handles = [source.stored[index]] if source.stored else _image_files(row["image"], source.root)
    return {
        "image_id": "|".join(handle.key for handle in handles),
        "problem": problem,
        "solution": solution,
        "answer": _letter_of(solution, options),
        "options": options,
        **_labels(row, source),
        "row": index,
        "source": source.name,
    }, handles


def _labels(row, source: Source) -> dict[str, str | None]:
    """The row's modality and question type, by its own word or by that of the file's name."""
    row = row if isinstance(row, dict) else {}
    labels = {"modality": row.get("modality") or row.get("subset"), "question_type": row.get("question_type")}
    return {key: value if isinstance(value, str) else source.labels.get(key) for key, value in labels.items()}


def _with_problem(row: dict) -> dict:
    """The row with the problem and the solution that MedVLM-R1's code makes of question, options and answer."""
    listed = _option_list(row.get("options"))
    if row.get("answer") not in listed:
        raise BadRow(f"answer {str(row.get('answer'))[:40]!r} is not an option", f"one of its {len(listed)} options")
    problem = "\n".join([row["question"], *(f"{letter}) {text}" for letter, text in zip(LETTERS, listed, strict=False))])
    return {**row, "problem": problem, "solution": LETTERS[listed.index(row["answer"])]}


def _option_list(listed) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed) or not 2 <= len(listed) <= len(LETTERS):
        raise BadRow("unusable options", f"a list of 2 to {len(LETTERS)} texts")
    return listed


def _options_of(row: dict, problem: str) -> tuple[dict[str, str], str]:
    """The options, and the problem with them: a list that the problem does not show is appended as lines `A) text`."""
    inline, listed = parse_options(problem), row.get("options")
    if listed is None:
        if not inline:
            raise BadRow("no options", "'A)..., B)...' in the problem, or a list of options")
        return inline, problem
    options = list_options(_option_list(listed))
    if not inline:
        problem = problem + "\n" + "\n".join(f"{letter}) {text}" for letter, text in options.items())
    return options, problem


def _letter_of(solution: str, options: dict[str, str]) -> str:
    """The option that `<answer> X </answer>` or a bare `X` names."""
    _, tag, tagged = solution.partition("<answer>")
    content = (tagged.partition("</answer>")[0] if tag else solution).strip()
    letter = match_option(content, options)
    if letter is None:
        raise BadRow(f"answer {content[:40]!r} is not an option", f"one of {', '.join(options)}")
    return letter


def _image_files(image, root: Path) -> list[ImageFile]:
    """The named files, none of them outside `root` (by name: a link inside the root is its owner's choice)."""
    names = image if isinstance(image, list) else [image]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise BadRow("unusable image", "a path or a list of paths")
    paths = [Path(os.path.normpath(root / name)) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_relative_to(root):
            raise BadRow(f"image path {name!r} leaves {str(root)!r}", "a path inside the image root")
    return [ImageFile(path) for path in paths]
