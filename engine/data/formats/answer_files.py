"""Answers that a model gave to questions about images, from a file of them: JSON lines, or an array.

A row is one of `engine.data.questions` (`image`, `problem`, `solution` and so on) and has one answer or several in `completion`,
`completions`, `response` or `responses`: a text, a list of texts, or messages as TRL has them, or a list of such. Several rows may
be about one question. An evaluation file, ours (evaluation.json) or one in the published layout (`--output_path`), is read as well:
there `results` are the rows, each with its `question` and `model_output`.

`[i]` of the set is a question's row that also has `completions`, the texts, at least one.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.formats.columns import as_question
from engine.data.formats.folders import ending
from engine.data.formats.json_rows import read_json_rows
from engine.data.questions import Checked, QuestionSet, check_question, load_questions
from engine.data.rows import BadRow
from engine.data.sources import Source
from engine.data.split_names import name_of_split
from engine.errors import InputError

EXPECTED = "a .json or .jsonl file of answers, with image, problem, solution and completion in each row"
COMPLETIONS = ("completion", "completions", "response", "responses", "model_output")
OF_RESULT = ("modality", "question_type")  # what our evaluation files have beside the question


def load_answers(
    paths: str | Sequence[str],
    *,
    image_root: str | Path | None = None,
    on_bad_row: str = "error",
    limit: int | None = None,
) -> QuestionSet:
    """The answers in one or several files; arguments and errors as those of `engine.data.questions.load_questions`."""
    files = [paths] if isinstance(paths, str) else paths
    sources = [read_answers(path, image_root) for path in files]
    return load_questions(sources, on_bad_row=on_bad_row, limit=limit, check_row=check_answers)


def read_answers(path: str | Path, image_root: str | Path | None = None) -> Source:
    """The raw rows of a file; relative image names start at `image_root`, by default the folder of the file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'no such file'} (expected {EXPECTED})")
    if ending(path) not in (".json", ".jsonl"):
        raise InputError(f"{path}: unsupported kind of file {path.suffix!r} (expected {EXPECTED})")
    rows = read_json_rows(path, EXPECTED, key="results")
    if not rows:
        raise InputError(f"{path}: no rows in it (expected {EXPECTED})")
    root = Path(os.path.abspath(image_root or path.parent))
    return Source(str(path), rows, root, name_of_split(Path(os.path.abspath(path))))


def check_answers(index: int, row: Any, source: Source) -> Checked:
    """A raw row -> (record, image handles); BadRow if it cannot be used."""
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", "an object with the keys image, problem, solution, completion")
    found = next((key for key in COMPLETIONS if row.get(key) is not None), None)
    if found is None:
        raise BadRow("no answer", "one in completion, or several in completions")
    asked = {key: value for key, value in row.items() if key not in COMPLETIONS}
    if isinstance(row.get("question"), dict):
        asked = {key: row[key] for key in OF_RESULT if row.get(key)} | row["question"]
        if isinstance(asked.get("image"), str):
            asked["image"] = asked["image"].split("|")  # several, as evaluation files have them
    record, handles = check_question(index, as_question(asked), source)
    record.pop("completion", None)
    return record | {"completions": _texts(found, row[found])}, handles


def _texts(key: str, value: Any) -> list[str]:
    """The answers in a cell."""
    several = isinstance(value, list) and not all(isinstance(part, dict) for part in value)
    texts = list(map(_text, value)) if several else [_text(value)]
    if not all(isinstance(text, str) for text in texts):
        number = next(i for i, text in enumerate(texts) if not isinstance(text, str))
        raise BadRow(f"answer {number} in {key} is not text", "a text, or a list of texts")
    return [text for text in texts if text is not None]


def _text(value: Any) -> str | None:
    """What an answer says: a text, or the contents of messages; None of anything else."""
    if isinstance(value, list) and value:
        parts = [_text(part.get("content", part.get("text"))) if isinstance(part, dict) else None for part in value]
        return None if None in parts else "".join(part for part in parts if part is not None)
    return value if isinstance(value, str) else None
