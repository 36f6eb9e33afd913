"""Multiple-choice questions about images: every row is checked when the set is loaded, images open when a row is asked for.

A row of a file has `image` (a path or a list of paths), `problem` (the question, options inline) and `solution` (`<answer> C
</answer>` or a bare letter), and may have `options` (a list), `modality`, `question_type` or `subset`. In place of problem and
solution it may have `question`, `options` and `answer` (an option's text), as HuatuoGPT-Vision's collection. What other data sets
and tables call these, `engine.data.formats.columns` knows. `[i]` gives

    images: list of PIL RGB      image_id: str, the image file(s)       problem, solution: str, as in the file
    answer: str, the letter      options: {"A": "CT", "B": ...}          modality, question_type: str or None
    row: int, counted from 0     source: str, the file it stands in
    completion: str, only where the row has an answer of its own to learn, or the thinking of one

What becomes of a bad row: see `engine.data.rows`.
"""

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from engine.data.formats.columns import as_question, rename
from engine.data.formats.names import find_named
from engine.data.image_check import ImageHandle, find_bad_images
from engine.data.images import EXPECTED, MISSING
from engine.data.loaders.undecoded import read_undecoded
from engine.data.options.answers import read_option, tagged
from engine.data.options.shown import list_options, parse_options, same_options
from engine.data.options.texts import LETTERS, plain
from engine.data.rows import BadRow, BadRows, Rows, evenly_spread
from engine.data.sources import ImageFile, Source, read_source
from engine.data.split_names import short_modality
from engine.errors import InputError

REQUIRED = ("image", "problem", "solution")
Checked = tuple[dict, list[ImageHandle]]  # a row's record, and the handles of its images


class QuestionSet(Rows[Sequence[ImageHandle]]):
    """Checked questions; a row's handles are those of its images, whose `open()` gives a PIL image."""

    def open(self, handle: Sequence[ImageHandle]) -> dict[str, Any]:
        return {"images": [image.open() for image in handle]}

    def undecoded(self, index: int) -> dict[str, Any]:
        return {**self.records[index], "images": [read_undecoded(image) for image in self.handles[index]]}


def load_questions(
    source: str | Path | Source | Sequence[str | Path | Source],
    *,
    image_root: str | Path | None = None,
    split: str = "train",
    on_bad_row: str = "error",
    limit: int | None = None,
    first: int | None = None,
    modalities: Collection[str] | None = None,
    check_row: Callable[[int, Any, Source], Checked] | None = None,
) -> QuestionSet:
    """Questions of one or several files or folders (or of a `Source`), one after the other.

    `split` chooses within folders that hold several. `image_root` is where relative image paths start (default: the folder of
    each file); no path may leave it. `modalities` (short names, see `engine.data.split_names`) are the only ones read. `limit`
    reads only so many of these, evenly spread over all sources, and `first` only the first so many, as published code does; either
    counts rows before any are skipped. `check_row(index, row, source)` turns a raw row into its record and image handles, or raises
    `BadRow`; by default it is `check_question` of the row by our names.
    InputError for a bad row, a source that cannot be read, and where no row is left.
    """
    paths = [source] if isinstance(source, str | Path | Source) else list(source)
    if not paths:
        raise InputError("no data set given (expected at least one file or folder)")
    sources = [path if isinstance(path, Source) else read_source(path, split, image_root) for path in paths]
    raw = [(found, index, row) for found in sources for index, row in enumerate(found.rows)]
    if modalities is not None:
        raw = [place for place in raw if short_modality(_labels(place[2], place[0])["modality"]) in modalities]
    raw = raw[:first] if first is not None else [raw[i] for i in evenly_spread(len(raw), limit)]
    rows: list[Checked] = []
    skipped = []
    for found in sources:
        bad = BadRows(on_bad_row)
        own = [(index, row) for owner, index, row in raw if owner is found]
        rows += _check_rows(own, found, check_row or _check_named, bad)
        skipped += bad.lines()
    if skipped and not rows:
        raise InputError(f"all {len(skipped)} rows are bad; the first: {skipped[0]}")
    if modalities and not rows:
        names = ", ".join(str(path.name if isinstance(path, Source) else path) for path in paths)
        raise InputError(f"{names}: no row about {' or '.join(modalities)} (expected such a `modality` or `subset`)")
    return QuestionSet([record for record, _ in rows], [handles for _, handles in rows], skipped)


def _check_rows(
    raw: Sequence[tuple[int, Any]], source: Source, check_row: Callable[[int, Any, Source], Checked], bad: BadRows
) -> list[Checked]:
    """The good ones of the rows (index, row) of one source; `bad` meets the others. All text is checked before any image."""
    rows: list[Checked] = []
    for index, row in raw:
        try:
            rows.append(check_row(index, row, source))
        except BadRow as error:
            bad.add(source.name, index, error, source.line_of(index))
    distinct = {handle.key: handle for _, handles in rows for handle in handles}
    reasons = find_bad_images(list(distinct.values()), source.root, stop_at_first=bad.stops)
    good = []
    for record, handles in rows:
        broken = next((handle.key for handle in handles if handle.key in reasons), None)
        if broken is None:
            good.append((record, handles))
            continue
        name = "" if source.stored else f" {os.path.relpath(broken, source.root)[:200]!r}"
        missing = broken if reasons[broken] == MISSING else None
        why = BadRow(f"image{name}: {reasons[broken]}", EXPECTED, missing)
        bad.add(source.name, record["row"], why, source.line_of(record["row"]))
    return good


def _check_named(index: int, row: Any, source: Source) -> Checked:
    return check_question(index, as_question(row), source)


def check_question(index: int, row: Any, source: Source) -> Checked:
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
    letter = _letter_of(solution, options)
    for answer in row.get("answers", [row.get("answer")]):
        _check_answer(answer, letter, options)
    handles: list[ImageHandle] = [*(source.stored[index] if source.stored else _image_files(row["image"], source.root))]
    if not handles:
        raise BadRow("no image is stored here", "at least one")
    return {
        "image_id": "|".join(handle.key for handle in handles),
        "problem": problem,
        "solution": solution,
        "answer": letter,
        "options": options,
        **_labels(row, source),
        **_own_answer(row, letter),
        "row": index,
        "source": source.name,
    }, handles


def _own_answer(row: dict, letter: str) -> dict[str, str]:
    """The row's `completion`, if it has one, or its `thinking` and the letter."""
    completion, thinking = (text.strip() if isinstance(text := row.get(key), str) else "" for key in ("completion", "thinking"))
    thinking = thinking.removeprefix("<think>").removesuffix("</think>").strip()
    if thinking and not completion:
        completion = f"<think>{thinking}</think><answer> {letter} </answer>"
    return {"completion": completion} if completion else {}


def _labels(row: Any, source: Source) -> dict[str, str | None]:
    """The row's modality and question type, by its own word or by that of the file's name."""
    row = rename(row) if isinstance(row, dict) else {}
    labels = {"modality": row.get("modality") or row.get("subset"), "question_type": row.get("question_type")}
    return {key: value.strip() if isinstance(value, str) else source.labels.get(key) for key, value in labels.items()}


def _with_problem(row: dict) -> dict:
    """The row with the problem and the solution that MedVLM-R1's code makes of question, options and answer."""
    listed = _option_list(row.get("options"))
    if row.get("answer") not in listed:
        raise BadRow(f"answer {str(row.get('answer'))[:40]!r} is not an option", f"one of its {len(listed)} options")
    if listed.count(row["answer"]) > 1:
        raise BadRow(f"answer {str(row['answer'])[:40]!r} is two of its options", "one of them, or its letter")
    _, problem = _options_of(row, row["question"])
    return {**row, "problem": problem, "solution": LETTERS[listed.index(row["answer"])]}


def _option_list(listed: Any) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed) or not 2 <= len(listed) <= len(LETTERS):
        raise BadRow("unusable options", f"a list of 2 to {len(LETTERS)} texts")
    return listed


def _options_of(row: dict, problem: str) -> tuple[dict[str, str], str]:
    """The options, and the problem with them: a list that the problem does not show is appended as lines `A) text`."""
    inline, listed = parse_options(problem), row.get("options")
    if listed is None and not inline:
        raise BadRow("no options", "'A)..., B)...' in the problem, or a list of options")
    options = inline if listed is None else list_options(_option_list(listed))
    for letter, text in options.items():
        if not plain(text):
            raise BadRow(f"option {letter} is empty", "a text for each option")
    if listed is None or inline and same_options(inline, options):
        return options, problem
    if clear := parse_options(problem, apart=True):
        raise BadRow(f"the problem shows {_shown(clear)} and the list of options has {_shown(options)}", "the same in both")
    texts = zip(options.items(), listed, strict=True)  # as they stand in the list, but for letters of its own
    lines = [f"{letter}) {given if given.strip() == text else text}" for (letter, text), given in texts]
    return options, "\n".join([problem, *lines])


def _shown(options: dict[str, str]) -> str:
    return repr(", ".join(f"{letter}) {text}" for letter, text in options.items())[:60])


def _letter_of(solution: str, options: dict[str, str]) -> str:
    """The option that the last `<answer> X </answer>`, or the whole solution where it has none, names."""
    content = tagged(solution)
    content = (solution if content is None else content).strip()
    letter = read_option(content, options)
    if letter is None:
        raise BadRow(f"answer {content[:40]!r} is not an option", f"one of {', '.join(options)}")
    return letter


def _check_answer(answer: Any, letter: str, options: dict[str, str]) -> None:
    """BadRow where an answer of a row names another option than the one that counts."""
    if not isinstance(answer, str) or plain(answer) == plain(options[letter]):
        return
    other = read_option(answer, options)
    if other is not None and other != letter:
        raise BadRow(f"the solution names {letter} and the answer {other}", "the same of both")


def _image_files(image: Any, root: Path) -> list[ImageFile]:
    """The named files, none of them outside `root` (by name: a link inside the root is its owner's choice)."""
    names = image if isinstance(image, list) else [image]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise BadRow("unusable image", "a path or a list of paths")
    paths = [find_named(root, name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_relative_to(root):
            raise BadRow(f"image path {name[:200]!r} leaves {str(root)!r}", "a path inside the image root")
    return [ImageFile(path) for path in paths]
