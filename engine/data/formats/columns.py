"""A row by our names: what the published data sets and tables of one's own call image, question, options and answer.

| ours | theirs, in any case and punctuation, the first that is filled |
|---|---|
| image | image, images, image_path, image_name (VQA-RAD), img_name (SLAKE), figure_path (PMC-VQA) |
| options | options, choices: a list, {"A": text, ...}, or one text with | or ; or line breaks in it; or columns A, B, ... |
| A, B, ... | A, option_A (OmniMedVQA), choice_A (PMC-VQA) |
| answer | answer, gt_answer (OmniMedVQA), answer_label (PMC-VQA) |
| modality | modality, modality_type (OmniMedVQA) |
| question_type | question_type, content_type (SLAKE) |
| completion | completion: a whole answer, to be learnt |
| thinking | thinking (Med-R1's fine-tuning), reasoning: that of the answer alone |

`problem`, `solution`, `question` and `subset` have no other names.
"""

import ast
import json
import math
import re
from collections.abc import Hashable, Iterable
from functools import lru_cache
from typing import Any

from engine.data.formats.text import is_unicode
from engine.data.rows import BadRow
from engine.json_names import named_twice

THEIRS = {
    "image": ("image", "images", "imagepath", "imagename", "imgname", "figurepath"),
    "problem": ("problem",),
    "solution": ("solution",),
    "question": ("question",),
    "options": ("options", "choices"),
    "answer": ("answer", "gtanswer", "answerlabel"),
    "modality": ("modality", "modalitytype"),
    "subset": ("subset",),
    "question_type": ("questiontype", "contenttype"),
    "completion": ("completion",),
    "thinking": ("thinking", "reasoning"),
}
OURS = {theirs: (ours, rank) for ours, names in THEIRS.items() for rank, theirs in enumerate(names)}
OPTION = re.compile(r"(?:option|choice)?([a-z])")
CLOSED = ["yes", "no"]
SEPARATORS = ("\n", "|", ";")


def our_name(column: str) -> str | None:
    """What we call a column: a key of THEIRS, the capital letter of an option's column, or None."""
    return _place(column)[0]


@lru_cache(maxsize=4096)
def _place(column: str) -> tuple[str | None, int]:
    """(our name, its rank among theirs)."""
    plain = "".join(filter(str.isalnum, column.casefold()))
    if plain in OURS:
        return OURS[plain]
    option = OPTION.fullmatch(plain)
    return (option[1].upper(), 0 if plain == option[1] else 1) if option else (None, 0)


def rename(row: dict) -> dict:
    """The row by our names, each with its first filled value; columns without one of ours are left out."""
    found: dict[str, list[tuple[int, bool, Any]]] = {}
    for column, value in row.items():
        name, rank = _place(column) if isinstance(column, str) else (None, 0)
        if name is not None and value is not None and not (isinstance(value, float) and math.isnan(value)):
            found.setdefault(name, []).append((rank, column != name, value))
    return {name: _first_filled(values) for name, values in found.items()}


def _first_filled(values: list[tuple[int, bool, Any]]) -> Any:
    if len(values) > 1:
        values.sort(key=lambda value: (_is_blank(value[2]), *value[:2]))
    return values[0][2]


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def as_question(row: Any) -> dict:
    """A raw row with `image`, and `problem` and `solution` or `question`, `options` and `answer`, which are still to be checked.

    A question without options whose answer is yes or no has these two. BadRow if it is no row, its options cannot be told, or its
    text cannot be written.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", "an object with the keys image, problem, solution")
    named = rename(row)
    for key, value in named.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not is_unicode(text):
                raise BadRow(f"{key} has half a character ({ascii(text)[:60]})", "Unicode text")
    texts = [named[key] for key in ("question", "problem") if isinstance(named.get(key), str) and not _is_blank(named[key])]
    if len(texts) > 1 and _letters_of(texts[0]) not in _letters_of(texts[1]):
        raise BadRow("question and problem ask two things", "the question in the problem, beside its options, or one of the two")
    letters = {name: named.pop(name) for name in list(named) if len(name) == 1}
    listed = _read_list(named.pop("options", None))
    _check_columns(row, listed, letters)
    options = listed or _options_of_columns(letters)
    if isinstance(named.get("image"), str) and named["image"].lstrip().startswith("["):
        named["image"] = _parse(named["image"]) or named["image"]
    given = "answer" if "answer" in named and _is_blank(named.get("solution", "")) else "solution"
    answer = _as_text(named.get(given))
    asked = named.get("problem", named.get("question"))
    if "problem" not in named:
        if not isinstance(named.get("question", ""), str):
            raise BadRow("question is not text", "question to be text")
        for key in ("question", given):
            if _is_blank(named.get(key)):
                raise BadRow(f"empty {key}", f"{key} to be text")
    if options is None and isinstance(asked, str) and isinstance(answer, str) and not re.search(r"(^|[\s,;])A\)", asked):
        plain = answer.strip().rstrip(".").casefold()
        if plain in CLOSED:
            options, answer = CLOSED, plain
    if options is not None:
        named["options"] = options
    if answer is not None:
        named[given] = answer
    names_one = isinstance(options, list | tuple) and answer in options
    if isinstance(named.get("question"), str) and "problem" not in named and not names_one:
        named["problem"] = named["question"]  # the answer is a letter, or an option in another spelling
    if "problem" in named and answer is not None:
        named["solution"] = answer
    others = [_as_text(value) for column, value in row.items() if isinstance(column, str) and our_name(column) == "answer"]
    if len(others) > 1:
        named["answers"] = others
    return named


def _check_columns(row: dict, listed: Any, letters: dict) -> None:
    """BadRow where an option has two texts: in two columns, or in its column and in the list."""
    texts: dict[str, set[str]] = {}
    for column, value in row.items():
        name = our_name(column) if isinstance(column, str) else None
        if name is not None and name in letters and isinstance(value, str) and value.strip():
            texts.setdefault(name, set()).add(value.strip().casefold())
    two = next((name for name, found in texts.items() if len(found) > 1), None)
    if two is not None:
        raise BadRow(f"two columns have other texts for option {two}", "the same in both")
    if isinstance(listed, list) and sorted(texts) == [chr(ord("A") + i) for i in range(len(listed))] and len(listed) > 1:
        differ = [name for name, text in zip(sorted(texts), listed, strict=True) if str(text).strip().casefold() not in texts[name]]
        if differ:
            raise BadRow(f"the list of options and the column {differ[0]} have other texts", "the same in both")


def _letters_of(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def _as_text(value: Any) -> Any:
    """Numbers as text, none for what is not a number (an empty cell of pandas); anything else as it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _read_list(options: Any) -> Any:
    """Options as a list where they are one, a dict by letters, or a text; None for an empty one."""
    if options is None or _is_blank(options):
        return None
    if isinstance(options, str):
        options = _split(options.strip())
    if isinstance(options, dict):
        letters = {our_name(key) if isinstance(key, str) else None: text for key, text in options.items()}
        if None in letters or len(letters) < len(options):
            raise BadRow("unusable options", 'a list of texts, or {"A": text, "B": text, ...}')
        return _options_of_columns(letters)
    return [_as_text(text) for text in options] if isinstance(options, list) else options


def _split(text: str) -> Any:
    """The list or dict that a cell holds as JSON or as Python writes it, or its parts."""
    if text[0] in "[{" and (parsed := _parse(text)):
        return parsed
    for separator in SEPARATORS:
        if separator in text:
            return [part.strip() for part in text.removesuffix(separator).split(separator)]
    raise BadRow("unusable options", "a list of texts, or one text with | or ; or line breaks between them")


def _parse(text: str) -> Any:
    """The JSON or Python literal that `text` is, or None; BadRow where it has a name twice."""
    for read in (_read_json, _read_python):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _read_json(text: str) -> Any:
    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names(name for name, _ in pairs)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=each_once)


def _read_python(text: str) -> Any:
    """A literal; nothing is run."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            _check_names(key.value for key in node.keys if isinstance(key, ast.Constant))
    return ast.literal_eval(tree)


def _check_names(names: Iterable[Hashable]) -> None:
    if twice := named_twice(names):
        raise BadRow(f"{twice} is there twice", "each name once")


def _options_of_columns(letters: dict) -> list | None:
    """The options in the columns A, B, ... up to the last filled one; None where there are none."""
    filled = sorted(letter for letter, text in letters.items() if text is not None and not _is_blank(text))
    if not filled or filled == ["A"] and len(letters) == 1:
        return None
    expected = [chr(ord("A") + i) for i in range(len(filled))]
    if filled != expected:
        gap = next(letter for letter in expected if letter not in filled)
        raise BadRow(f"option {filled[-1]} without {gap}", "options from A on, none of them left out")
    return [_as_text(letters[letter]) for letter in filled]
