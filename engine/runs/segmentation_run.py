"""A segmentation run from start to end: evaluate, train, evaluate again, report. Recipes bring the model and the rows."""

import json
import logging
import time
from collections.abc import Callable

from torch import nn

from engine.command.run import RunFolder, describe_device
from engine.data.masked_questions import MaskedQuestions
from engine.evaluation.masks import (
    LEGEND,
    SegmentationEvaluation,
    evaluate_segmentation,
    segmentation_samples,
    write_segmentation_evaluation,
)
from engine.report.report import write_curves, write_report
from engine.runs.training_run import train_to_end
from engine.training.checkpoints import find_checkpoint
from engine.training.masks import SegmentationConfig, SegmentationTrainer

EVALUATION_BATCH = 8
logger = logging.getLogger(__name__)


def run_segmentation(
    model: nn.Module,
    collate: Callable,
    args: SegmentationConfig,
    train: MaskedQuestions,
    test: MaskedQuestions | None,
    run: RunFolder,
    *,
    title: str,
    settings: dict,
    started: float,
) -> dict:
    """Train `model` (see `SegmentationTrainer`; it also has `segment_batch(images, questions, max_new_tokens=)`) and write the run
    folder; `test` None: no evaluation. `started`: the `time.perf_counter()` from which seconds count. Returns the headline numbers.

    Raises Interrupted after saving, where a signal asked to stop.
    """
    resume = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    run.write_json("config.json", settings)
    trainer = SegmentationTrainer(model, collate, args, train)
    logger.info("%s: %d training rows, on %s, output in %s", title, len(train), describe_device(), run.path)

    before = _before(model, test, run, resume is not None)
    checkpoint = train_to_end(trainer, run, resume)
    after = test and _evaluate(model, test, run, "after")

    headline = {"dice_before": before.get("dice"), "dice_after": after and after.headline()["dice"]}
    if after:
        headline["place_accuracy_before"] = before.get("place_accuracy")
        headline |= {name: after.headline()[name] for name in ("place_accuracy", "majority_accuracy")}
    headline |= {"seconds": time.perf_counter() - started, "checkpoint": checkpoint}
    if run.writes:
        rows = run.read_metrics()
        write_curves(run.path / "curves.png", rows)
        samples = segmentation_samples(after, test, model.segment_batch) if after else []
        write_report(
            run.path / "report.html",
            title=title,
            headline=headline,
            settings=settings,
            rows=rows,
            samples=samples,
            measures=after and after.shown(),
            legend=LEGEND,
            skipped=train.skipped,
        )
    return headline


def _before(model: nn.Module, test: MaskedQuestions | None, run: RunFolder, resumed: bool) -> dict:
    """Mean Dice and place accuracy before training, where they are measured; a resumed run reads what it wrote."""
    kept = run.path / "before.json"
    if test is None:
        return {}
    if resumed and kept.is_file():
        return json.loads(kept.read_text())
    headline = _evaluate(model, test, run, "before").headline()
    before = {name: headline[name] for name in ("dice", "place_accuracy")}
    run.write_json("before.json", before)
    return before


def _evaluate(model: nn.Module, test: MaskedQuestions, run: RunFolder, when: str) -> SegmentationEvaluation:
    evaluation = evaluate_segmentation(model.eval().segment_batch, test, batch_size=EVALUATION_BATCH, progress=run.writes)
    if run.writes and when == "after":
        write_segmentation_evaluation(run.path, evaluation)
    score = evaluation.headline()
    logger.info("%s training: Dice %.3f, %.3f of %d places right", when, score["dice"], score["place_accuracy"], len(test))
    return evaluation
