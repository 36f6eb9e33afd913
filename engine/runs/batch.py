"""One model on many files of questions: each file is a part of its own, kept when it is done, and one table holds them all.

    OUT/<kind>/<name>/    what `engine.runs.adversarial` writes of a part
    OUT/batch.csv         a line a part: accuracies with their intervals, of clean images and under each attack
    OUT/evaluation_summary.json   the same in AdvMed-R1's layout, accuracies in percent
    OUT/report.html       the table, looked at

A part is done when its done.json is there and was written with the settings and the file of now; a batch that was stopped goes on
with the first part that is not.
"""

import csv
import io
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.command.evaluation_settings import AttackArguments
from engine.command.run_folder import RunFolder, open_run
from engine.data.questions import QuestionSet, load_questions
from engine.data.split_names import KINDS, name_of_split, short_modality
from engine.data.starter.questions import build_starter_data
from engine.errors import InputError
from engine.files import plain, visible_files, write_json, write_whole
from engine.report.content import Table
from engine.report.report import write_report
from engine.shown_text import spreadsheet_cell

COUNTED = {"accuracy", "low", "high", "num_correct", "num_samples"}
DONE = "done.json"  # the last file that is written of a part: how it was asked, and its shares
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """The questions of one file. `kind`: modality or question_type, by which the published files are divided."""

    name: str
    kind: str
    path: str
    questions: QuestionSet

    @property
    def folder(self) -> str:
        return f"{self.kind}/{self.name.replace('/', '_')}"


def find_parts(args: AttackArguments, splits_dir: str | None, kinds: Sequence[str], modalities: Sequence[str] | None) -> list[Part]:
    """Every part with its questions, at most `args.limit` of each. All are checked: a bad file ends a batch before it begins.

    `splits_dir` holds <kind>/test/*.json as Med-R1 publishes them; without it the parts are `args.data`, a file each, and without
    these the starter test questions by their modality. `modalities`: only these, by their short or published names, each of which
    must be there.
    """
    wanted = {short_modality(name) or name for name in modalities or ()}
    if splits_dir is None and not args.data:
        return _starter_parts(args, kinds, wanted)
    files = [Path(path) for path in args.data or []]
    for kind in kinds if splits_dir is not None else ():
        inside = Path(splits_dir or "", kind, args.split)
        files += [path for path in visible_files(inside, "*.json") if inside.is_dir()]
    parts: dict[str, Part] = {}
    there: set[str] = set()
    for path in files:
        labels = name_of_split(path)
        kind, label = next(iter(labels.items()), ("modality", path.stem))
        name = short_modality(label) or label if kind == "modality" else label
        there |= {name} if kind == "modality" else set()
        if kind not in kinds or wanted and kind == "modality" and name not in wanted:
            continue
        found = load_questions(path, image_root=args.image_root, on_bad_row=args.on_bad_row, split=args.split, limit=args.limit)
        part = Part(name, kind, str(path), found)
        if part.folder in parts:
            raise InputError(f"{path}: a second file of {name} (expected one of each, or --output_dir and a run for either)")
        parts[part.folder] = part
    if "modality" in kinds and there and wanted - there:
        raise _absent(wanted - there, there)
    if not parts:
        where = f"{splits_dir}: no file <kind>/{args.split}/*.json in it" if splits_dir is not None else "--data: no file of these"
        raise InputError(f"{where} (expected {' or '.join(kinds)}, as Med-R1's Splits have it)")
    return list(parts.values())


def _absent(names: Collection[str], there: Collection[str]) -> InputError:
    return InputError(f"--modalities {' '.join(sorted(names))}: expected some of {', '.join(sorted(there))}")


def _starter_parts(args: AttackArguments, kinds: Sequence[str], wanted: Collection[str]) -> list[Part]:
    if "modality" not in kinds:
        raise InputError("--splits_dir is missing: the starter questions are divided by modality only")
    folder = build_starter_data()
    questions = load_questions(folder, split="test", on_bad_row=args.on_bad_row, limit=args.limit)
    found: dict[str, list[int]] = {}
    for index, record in enumerate(questions.records):
        found.setdefault(record["modality"], []).append(index)
    names = [name for name in sorted(found) if not wanted or short_modality(name) in wanted]
    if absent := set(wanted) - {short_modality(name) for name in names}:
        raise _absent(absent, found)
    return [Part(name, "modality", str(folder / "test.json"), questions.select(found[name])) for name in names]


def run_batch(
    recipe: str,
    title: str,
    parts: Sequence[Part],
    args: AttackArguments,
    settings: dict[str, Any],
    evaluate: Callable[[RunFolder, Part], dict[str, Any]],
) -> dict[str, Any]:
    """Evaluate every part that is not done, write the table of all, and return the headline numbers.

    `settings` decide what a part's answers are: where they differ, it is asked again. `evaluate(folder, part)` writes a part and
    returns {"clean": {"overall": share, ...}, an attack: ...}.
    """
    run = open_run(recipe, args.output_dir)
    run.write_json("config.json", asdict(args))
    shares: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(parts, 1):
        own = RunFolder(run.path / part.folder)
        asked = plain(settings | {"path": part.path, "file": _stamp(part.path), "rows": len(part.questions)})
        kept = _kept(own.path / DONE)
        if kept is not None and kept.get("asked") == asked:
            logger.info("%s (%d of %d): done already", part.folder, number, len(parts))
            shares[part.folder] = kept["shares"]
            continue
        logger.info("%s (%d of %d): %d questions", part.folder, number, len(parts), len(part.questions))
        shares[part.folder] = evaluate(own, part)
        own.write_json(DONE, {"asked": asked, "shares": shares[part.folder]})
    names = list(next(iter(shares.values())))
    if run.writes:
        _write_tables(run.path, title, parts, shares, names, args)
    overall = {name: _pooled([share[name]["overall"] for share in shares.values()]) for name in names}
    headline = {f"accuracy_{name}": accuracy for name, accuracy in overall.items()}
    count = sum(len(part.questions) for part in parts)
    by_part = {part.folder: {name: shares[part.folder][name]["overall"]["accuracy"] for name in names} for part in parts}
    return headline | {"parts": len(parts), "num_samples": count, "output": str(run.path), "by_part": by_part}


def _pooled(shares: Sequence[dict[str, Any]]) -> float:
    return sum(share["num_correct"] for share in shares) / sum(share["num_samples"] for share in shares)


def _stamp(path: str) -> list[int]:
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns]


def _kept(path: Path) -> dict[str, Any] | None:
    """What a file of an earlier run holds; None where there is none, or a damaged one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        parts = [share["overall"] for share in kept["shares"].values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return kept if parts and all(isinstance(part, dict) and COUNTED <= set(part) for part in parts) else None


def _write_tables(
    folder: Path, title: str, parts: Sequence[Part], shares: dict[str, dict[str, Any]], names: Sequence[str], args: AttackArguments
) -> None:
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    numbers = ("accuracy", "low", "high")
    rows.writerow(["kind", "name", "num_samples", *(f"{number}_{name}" for name in names for number in numbers)])
    for part in parts:
        cells = [shares[part.folder][name]["overall"][number] for name in names for number in numbers]
        rows.writerow([part.kind, spreadsheet_cell(part.name), len(part.questions), *(f"{cell:.6g}" for cell in cells)])
    write_whole(folder / "batch.csv", table.getvalue())
    results = [
        {
            "name": part.name,
            "type": part.kind,
            "path": part.path,
            "attacks": {
                name: {
                    "accuracy": 100 * shares[part.folder][name]["overall"]["accuracy"],
                    "output_path": str(folder / part.folder / f"evaluation_{name}.json"),
                }
                for name in names
            },
        }
        for part in parts
    ]
    kinds = list(dict.fromkeys(part.kind for part in parts))
    published = {"model_path": args.model, "evaluation_type": kinds[0] if len(kinds) == 1 else "both", "attacks": list(names)}
    write_json(folder / "evaluation_summary.json", published | {"epsilon": args.epsilon, "results": results})
    tables = [
        Table(
            f"accuracy by {kind.replace('_', ' ')}",
            list(names),
            {part.name: [shares[part.folder][name]["overall"] for name in names] for part in parts if part.kind == kind},
        )
        for kind in kinds
    ]
    headline = {f"accuracy_{name}": _pooled([share[name]["overall"] for share in shares.values()]) for name in names}
    skipped = [line for part in parts for line in part.questions.skipped]
    write_report(
        folder / "report.html", title=title, headline=headline, settings=asdict(args), rows=[], tables=tables, skipped=skipped
    )


def kinds_of(evaluation_type: str) -> list[str]:
    """The kinds of `--evaluation_type`: modality, task or question_type (one thing), or both."""
    if evaluation_type == "both":
        return list(KINDS)
    return ["question_type" if evaluation_type == "task" else evaluation_type]
