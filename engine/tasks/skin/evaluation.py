"""What the results of `engine.tasks.skin.task` say together: diagnoses, regions and boxes, and where diagnoses are mistaken."""

from collections.abc import Sequence
from typing import Any

from engine.data.lesions import DIAGNOSES
from engine.evaluation.lesion_scores import NONE, class_scores, mean_share
from engine.evaluation.score import Score
from engine.report.charts import as_png
from engine.report.content import Share
from engine.report.heatmap import HeatMap, heat_figure
from engine.tasks.evaluation import Columns, Evaluation

FOUND = 0.5  # a lesion is found by a box that overlaps more, as objects are in PASCAL VOC


def evaluate_lesions(results: list[dict[str, Any]], compat: str) -> Evaluation:
    """Accuracy, balanced accuracy and recalls of diagnoses, exact match of regions, overlap of boxes."""
    classes = class_scores([result["dx"] for result in results], [result["diagnosis"] for result in results], list(DIAGNOSES))
    by_dx = {dx: [result["correct"] for result in results if result["dx"] == dx] for dx in DIAGNOSES}
    measures: dict[str, Share] = {
        "diagnosis_accuracy": Score.of([result["correct"] for result in results]).as_dict(),
        "balanced_accuracy": classes.balanced_accuracy,
    }
    placed = [result["region_correct"] for result in results if result["region_correct"] is not None]
    if placed:
        measures["region_accuracy"] = Score.of(placed).as_dict()
    boxed = [result["iou"] for result in results if result["iou"] is not None]
    if boxed:
        measures["mean_iou"] = mean_share(boxed)
        measures["iou_over_50"] = Score.of([iou > FOUND for iou in boxed]).as_dict()
    undecided = sum(result["diagnosis"] is None for result in results) / len(results)
    headline: Columns = {name: share["accuracy"] for name, share in measures.items()}
    recall = {DIAGNOSES[dx]: Score.of(right).as_dict() for dx, right in by_dx.items() if right}
    return Evaluation(
        results,
        headline=headline | {"num_samples": len(results), "unanswered": undecided},
        measures=dict(measures),
        notes={"diagnosis_accuracy": f"{100 * undecided:.1f} % without a diagnosis"},
        baselines={"majority_accuracy": max(map(len, by_dx.values())) / len(results)},
        tables={"diagnosis": {name: {"recall": share} for name, share in recall.items()}},
        details={
            "recall": {name: share["accuracy"] for name, share in recall.items()},
            **{end: {name: share[end] for name, share in measures.items()} for end in ("low", "high")},
        },
        summary={"compat": compat, "confusion": {"labels": [*DIAGNOSES, NONE], "rows": classes.confusion}},
    )


def confusion_png(rows: Sequence[Sequence[int]]) -> bytes:
    """The matrix of `class_scores` as a picture: a line a true diagnosis that occurs, in percent of its rows."""
    names = [*DIAGNOSES, NONE]
    cells = {
        (dx, names[j]): 100 * count / sum(counts)
        for dx, counts in zip(DIAGNOSES, rows, strict=True)
        if sum(counts)
        for j, count in enumerate(counts)
    }
    true = [dx for dx, counts in zip(DIAGNOSES, rows, strict=True) if sum(counts)]
    drawn = HeatMap(
        "Diagnoses in % of each line", true, names, cells, row_label="true diagnosis", column_label="predicted diagnosis"
    )
    return as_png(heat_figure([drawn]))
