"""What the results of `engine.tasks.mecovqa.task` say together: words and masks, by kind of question, modality and class.

    accuracy         right answers / all: words exact (a closed question's as `is_right` reads them), masks with an IoU over 0.5
    answer_accuracy  right answers / questions in words, where there are others too; closed_accuracy: of closed ones
    open_exact, open_recall, open_precision, open_f1, bleu, bleu_1 .. bleu_3, rouge1, rouge2, rougeL     of open questions
    mDice, mIoU      means over the questions for masks; seg_share: those of them whose answer has `<SEG>`

Shares have Wilson's 95 % intervals, means of fractions those of the percentile bootstrap. A measure is absent where no row asks for
it. Captions count as open questions.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from engine.data.mecovqa.samed2d import family
from engine.evaluation.lesion_scores import mean_share
from engine.evaluation.score import Score
from engine.evaluation.text_overlap import ROUGE, bleu_scores, rouge_scores
from engine.report.content import Share
from engine.tasks.evaluation import Columns, Evaluation

OVERLAPS = ("recall", "precision", "f1")
COLUMNS = ("closed_accuracy", "open_recall", "open_exact", "rougeL", "mDice", "mIoU", "seg_share")  # of the tables
ALL = "all"  # the line of all rows together

Results = Sequence[dict[str, Any]]


def evaluate_mecovqa(results: list[dict[str, Any]], compat: str) -> Evaluation:
    """All measures over all rows (at least one), and the shares among them by kind, by modality and by class of mask."""
    shares, numbers = shares_of(results), text_scores(results)
    table = {ALL: _line(results, shares, numbers)}
    groups = {"kind": _groups(results, "kind"), "modality": _groups(results, "modality", modality_name(compat))}
    groups["class"] = _groups([{**result, "class": name} for result in results if (name := class_name(result))], "class")
    for group in groups.values():
        table |= {name: _line(of_name, shares_of(of_name), {}) for name, of_name in group.items()}
    headline: Columns = {name: share["accuracy"] for name, share in shares.items()}
    return Evaluation(
        results,
        headline=headline | {**numbers, "num_samples": len(results)},
        measures=dict(shares) | dict(numbers),
        notes={"accuracy": "words exact, masks with an IoU over 0.5", "bleu": "right answers of fewer than four words lower it"},
        baselines=_baselines(results),
        tables={title: _lines(group) for title, group in groups.items() if group},
        details={end: {name: share[end] for name, share in shares.items()} for end in ("low", "high")},
        summary={"compat": compat, "table": table},
    )


def shares_of(results: Results) -> dict[str, Share]:
    """The measures with intervals, those that some row asks for."""
    found: dict[str, Share] = {"accuracy": Score.of([result["correct"] for result in results]).as_dict()}
    closed, opened, drawn = (_of_type(results, kind) for kind in ("closed", "open", "mask"))
    if drawn and (words := closed + opened):
        found["answer_accuracy"] = Score.of([result["correct"] for result in words]).as_dict()
    if closed:
        found["closed_accuracy"] = Score.of([result["correct"] for result in closed]).as_dict()
    if opened:
        found["open_exact"] = Score.of([result["correct"] for result in opened]).as_dict()
        found |= {f"open_{name}": mean_share([result[name] for result in opened]) for name in OVERLAPS}
        rouge = [rouge_scores(result["model_answer"], result["true_answer"]) for result in opened]
        found |= {name: mean_share([scores[name] for scores in rouge]) for name in ROUGE}
    if drawn:
        found["mDice"] = mean_share([result["dice"] for result in drawn])
        found["mIoU"] = mean_share([result["iou"] for result in drawn])
        found["seg_share"] = Score.of([result["has_seg"] for result in drawn]).as_dict()
    return found


def text_scores(results: Results) -> dict[str, float]:
    """BLEU of the answers to open questions; {} where there are none."""
    opened = _of_type(results, "open")
    if not opened:
        return {}
    return bleu_scores([result["model_answer"] for result in opened], [result["true_answer"] for result in opened])


def _of_type(results: Results, answer_type: str) -> list[dict[str, Any]]:
    return [result for result in results if result["answer_type"] == answer_type]


def modality_name(compat: str) -> Callable[[str | None], str]:
    """SA-Med2D's prefix -> the name of a line: what it is called, or as in MedPLIB's code the prefix up to its first `_`."""
    return family if compat == "default" else lambda prefix: (prefix or "unknown").split("_")[0]


def class_name(result: dict[str, Any]) -> str | None:
    """The class that a question's masks are of; None where they are of several, or it is not known."""
    names = set(result["mask_classes"])
    return names.pop() if len(names) == 1 else None


def _groups(results: Results, key: str, name: Callable[[Any], str] = str) -> dict[str, list[dict[str, Any]]]:
    """{name: its results}, in alphabetical order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(name(result[key]), []).append(result)
    return dict(sorted(found.items()))


def _lines(groups: dict[str, list[dict[str, Any]]]) -> dict[str, Columns]:
    """A line a group, each with the columns that one of them has."""
    shares = {name: shares_of(group) for name, group in groups.items()}
    columns = [column for column in COLUMNS if any(column in line for line in shares.values())]
    return {name: {column: line.get(column) for column in columns} for name, line in shares.items()}


def _line(results: Results, shares: dict[str, Share], numbers: dict[str, float]) -> dict[str, Any]:
    """The measures as evaluation.json and table.csv have them."""
    return {"num_samples": len(results), **{name: share["accuracy"] for name, share in shares.items()}, **numbers}


def _baselines(results: Results) -> dict[str, float]:
    """What answers that do not look would score: to each question its commonest answer; masks of all, and of no pixels."""
    found: dict[str, float] = {}
    if closed := _of_type(results, "closed"):
        of_question: dict[str, Counter[str]] = {}
        for result in closed:
            of_question.setdefault(result["question"], Counter())[result["true_answer"].lower()] += 1
        found["closed_majority_accuracy"] = sum(max(counts.values()) for counts in of_question.values()) / len(closed)
    if drawn := _of_type(results, "mask"):
        for name in ("full_mask_dice", "empty_mask_dice"):
            found[name] = sum(result[name] for result in drawn) / len(drawn)
    return found
