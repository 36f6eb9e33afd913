"""A segmentation run from start to end: evaluate, train, evaluate again, report. Recipes bring the model and the rows."""

import json
import logging
import random
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from tqdm.auto import trange

from engine.checkpoints import find_checkpoint
from engine.data.segmentation_rows import MaskedQuestions
from engine.report import write_curves, write_report
from engine.run import RunFolder, describe_device
from engine.segmentation import SegmentationConfig, SegmentationTrainer
from engine.segmentation_evaluate import (
    LEGEND,
    SegmentationEvaluation,
    evaluate_segmentation,
    segmentation_samples,
    write_segmentation_evaluation,
)
from engine.training_run import train_to_end

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

    dice_before = _dice_before(model, test, run, resume is not None)
    checkpoint = train_to_end(trainer, run, resume)
    after = test and _evaluate(model, test, run, "after")

    headline = {"dice_before": dice_before, "dice_after": after and after.headline()["dice"]}
    headline |= {name: after.headline()[name] for name in ("place_accuracy", "majority_accuracy") if after}
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


def _dice_before(model: nn.Module, test: MaskedQuestions | None, run: RunFolder, resumed: bool) -> float | None:
    """Mean Dice before training; a resumed run reads what it wrote."""
    kept = run.path / "before.json"
    if test is None:
        return None
    if resumed and kept.is_file():
        return json.loads(kept.read_text())["dice"]
    dice = _evaluate(model, test, run, "before", max_new_tokens=0).headline()["dice"]
    run.write_json("before.json", {"dice": dice})
    return dice


def _evaluate(
    model: nn.Module, test: MaskedQuestions, run: RunFolder, when: str, max_new_tokens: int = 64
) -> SegmentationEvaluation:
    model.eval()
    segment = partial(model.segment_batch, max_new_tokens=max_new_tokens)
    evaluation = evaluate_segmentation(segment, test, batch_size=EVALUATION_BATCH, progress=run.writes)
    if run.writes and when == "after":
        write_segmentation_evaluation(run.path, evaluation)
    logger.info("Dice %s training: %.3f (%d held-out rows)", when, evaluation.headline()["dice"], len(test))
    return evaluation


def warm_up(vlm: nn.Module, collate: Callable, rows: MaskedQuestions, *, steps: int, learning_rate: float, seed: int = 0) -> None:
    """Teach a randomly initialised `vlm` (called as Hugging Face's are) the language of the answers, all its weights: what a
    pretrained one brings along."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    parameters = list(vlm.parameters())
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    vlm.train()
    for _ in trange(steps, desc="warming up the language model", unit="step"):
        batch = collate([rows[i] for i in order.choices(range(len(rows)), k=16)])
        vlm(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    vlm.eval()
