"""Distillation: of a teacher's answers the right ones become a set that supervised fine-tuning reads (`recipes.medr1_sft`).

FOLDER/train.jsonl       a row an answer that was kept: image, problem, solution, completion, options, modality, question_type,
                         original (the image's own name)
FOLDER/images/train/     the images of these rows, each once, as they are but upright
FOLDER/rejected.jsonl    a row an answer that was not: reason, why, read (the letter it names), completion, and its question
FOLDER/report.json       counts by reason and by modality; report.html shows them
FOLDER/replies.jsonl     what the teacher said (`engine.runs.replies`), where it was asked

train.jsonl is written last and whole; where no answer can be kept there is none.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.command.distill_settings import AnswerSelection
from engine.command.run_folder import RunFolder
from engine.data.prepare.folder import write_images
from engine.data.questions import QuestionSet
from engine.errors import InputError
from engine.files import write_whole
from engine.progress import progress
from engine.report.content import Sample, ShownAnswer, Table
from engine.report.report import write_report
from engine.runs.replies import Replies, Reply, digest_of
from engine.runs.teachers import Teacher
from engine.tasks.completions.verdicts import REASONS, Verdict, judge_answers
from engine.tasks.evaluation import spread

SET = "train.jsonl"
HOPELESS = 10  # questions without a reply, and none with one, after which no further one is asked
UNNAMED = "not told"  # the modality of rows without one
SHOWN = 12
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """A question's replies (None: there is none), and why some are not there."""

    replies: list[Reply | None]
    failures: dict[int, str]


def given_answers(questions: QuestionSet) -> list[Answered]:
    """The answers that the rows of `engine.data.formats.answer_files` hold."""
    return [Answered([Reply(text) for text in record["completions"]], {}) for record in questions.records]


def ask_teacher(teacher: Teacher, questions: QuestionSet, samples: int, replies: Replies) -> list[Answered]:
    """So many replies to each question; those that are there already are not asked for again, and each new one is kept at once.

    InputError where the teacher gives no answer any more, or HOPELESS times none that can be used and no other.
    """
    places = [(place, sample) for place in range(len(questions)) for sample in range(samples)]
    wanted = [(place, sample) for place, sample in places if replies.of(questions.record(place), sample) is None]
    if there := len(places) - len(wanted):
        logger.info("%s: %d of %d replies are there, and are not asked for again", replies.path, there, len(places))
    elif wanted:
        logger.info("%s: keeps the replies; the same command with --output_dir %s goes on", replies.path, replies.path.parent)
    failures: dict[int, dict[int, str]] = defaultdict(dict)
    answered, failed = there, 0
    for place, sample, reply in progress(teacher(questions, wanted), desc="asking", total=len(wanted), unit="answer", leave=False):
        if isinstance(reply, str):
            failures[place][sample], failed = reply, failed + 1
            if not answered and failed >= min(HOPELESS, len(wanted)):
                raise InputError(reply)
            continue
        replies.add(questions.record(place), sample, reply)
        answered += 1
    records = questions.records
    return [Answered([replies.of(record, s) for s in range(samples)], failures[i]) for i, record in enumerate(records)]


def distill(run: RunFolder, questions: QuestionSet, answered: Sequence[Answered], chosen: AnswerSelection) -> dict[str, Any]:
    """Judge the answers, write the run folder and return the headline numbers. InputError where none can be kept."""
    kept: dict[str, list[str]] = defaultdict(list)
    verdicts = [
        judge_answers(row["options"], row["answer"], of_row.replies, chosen.form, chosen.per_question, kept[digest_of(row)])
        for row, of_row in zip(questions.records, answered, strict=True)
    ]
    report = count(questions, verdicts)
    rejected = [line for i in range(len(questions)) for line in _rejected(questions.records[i], verdicts[i], answered[i].failures)]
    _write_lines(run.path / "rejected.jsonl", rejected)
    if not report["kept"]:
        (run.path / SET).unlink(missing_ok=True)
        run.write_json("report.json", report)
        reasons = ", ".join(f"{reason} {number}" for reason, number in report["rejected"].items())
        raise InputError(f"{run.path}: none of {report['answers']} answers can be kept ({reasons}; see rejected.jsonl)")
    rows = _rows(run.path, questions, verdicts)
    run.write_json("report.json", report)
    _write_page(run, questions, verdicts, report)
    _write_lines(run.path / SET, rows)
    headline = {key: value for key, value in report.items() if key != "bad_rows"}
    logger.info("%s: %d of %d answers kept, to %d of %d questions", run.path / SET, *_numbers(report))
    return headline | {"bad_rows": len(report["bad_rows"]), "output": str(run.path)}


def count(questions: QuestionSet, verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """{questions, answers, kept, questions_kept, rejected: {reason: number}, by_modality: {the same}, bad_rows: lines}."""
    modalities = [record["modality"] or UNNAMED for record in questions.records]
    by_modality = {
        name: _counts([of_row for of_row, own in zip(verdicts, modalities, strict=True) if own == name])
        for name in sorted(set(modalities))
    }
    return {**_counts(verdicts), "by_modality": by_modality, "bad_rows": list(questions.skipped)}


def _counts(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    reasons = Counter(verdict.reason for of_row in verdicts for verdict in of_row)
    return {
        "questions": len(verdicts),
        "answers": sum(map(len, verdicts)),
        "kept": reasons[None],
        "questions_kept": sum(any(verdict.reason is None for verdict in of_row) for of_row in verdicts),
        "rejected": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
    }


def _numbers(report: Mapping[str, Any]) -> list[int]:
    return [report[key] for key in ("kept", "answers", "questions_kept", "questions")]


def _rejected(record: dict, verdicts: Sequence[Verdict], failures: Mapping[int, str]) -> list[dict[str, Any]]:
    """A line for each answer that is not kept."""
    question = {"image": record["image_id"], **{key: record[key] for key in ("problem", "solution", "modality", "source", "row")}}
    return [
        {
            "reason": verdict.reason,
            "why": failures.get(number, REASONS[verdict.reason]),
            "read": verdict.read,
            "completion": verdict.text,
            "sample": number,
            **question,
        }
        for number, verdict in enumerate(verdicts)
        if verdict.reason is not None
    ]


def _rows(folder: Path, questions: QuestionSet, verdicts: Sequence[Sequence[Verdict]]) -> list[dict[str, Any]]:
    """The rows of the set, whose images are written into the folder."""
    texts = {i: kept for i, of_row in enumerate(verdicts) if (kept := [v.text for v in of_row if v.reason is None])}
    written = write_images(folder, "train", questions.select(texts), lambda handle: Path(handle.key).name)
    rows = []
    for row, of_row in zip(written, texts.values(), strict=True):
        images = {key: row[key][0] if len(row[key]) == 1 else row[key] for key in ("image", "original")}
        labels = {key: row[key] for key in ("modality", "question_type") if row[key]}
        told = {"problem": row["problem"], "options": list(row["options"].values()), "solution": row["solution"]}
        rows += [
            {"image": images["image"], **told, "completion": text, **labels, "original": images["original"]} for text in of_row
        ]
    return rows


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line of JSON a row; half characters, which no file takes, as JSON names them."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))


def _write_page(run: RunFolder, questions: QuestionSet, verdicts: Sequence[Sequence[Verdict]], report: dict[str, Any]) -> None:
    names = ["kept", *report["rejected"]]
    lines = {name: [own["kept"], *(own["rejected"].get(r, 0) for r in names[1:])] for name, own in report["by_modality"].items()}
    tables = [
        Table(
            "answers by what became of them",
            ["answers"],
            {"kept": [report["kept"]]} | {r: [n] for r, n in report["rejected"].items()},
        ),
        Table("answers by modality", names, lines),
    ]
    samples = []
    for place in spread(range(len(questions)), SHOWN):
        row = questions[place]
        shown = [
            ShownAnswer(v.text or "", {}, right=v.read == row["answer"], name=f"not kept: {v.reason}" if v.reason else "kept")
            for v in verdicts[place]
        ]
        truth = f"{row['answer']}) {row['options'][row['answer']]}"
        samples.append(Sample(row["images"][0], row["problem"], truth, shown))
    write_report(
        run.path / "report.html",
        title="Distillation",
        headline=dict(zip(("kept", "answers", "questions with one", "questions"), _numbers(report), strict=True)),
        settings={},
        rows=[],
        tables=tables,
        samples=samples,
        skipped=report["bad_rows"],
    )
