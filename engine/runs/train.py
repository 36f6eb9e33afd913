"""A training run from start to end: evaluate, train, evaluate again, report. Any model on any task with any of the trainers."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from engine.command.run_folder import RunFolder, open_run
from engine.data.rows import Rows
from engine.data.splits import Splits, readable_prompts
from engine.device import describe_device
from engine.errors import InputError, Interrupted
from engine.report.content import value_of
from engine.report.report import alone, write_curves, write_report
from engine.runs.evaluate import evaluate, log_measures, write_evaluation
from engine.tasks.evaluation import Evaluation, comparisons, tables
from engine.tasks.task import Task
from engine.training.checkpoints import StopOnSignal, find_checkpoint, newest_checkpoint
from engine.training.config.training import PolicyConfig, TrainingConfig
from engine.training.manifest import Manifest, check_same, deciding_settings, row_identity
from engine.training.run_log import RunLog
from engine.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(
    recipe: str,
    title: str,
    trainer_class: Callable[[Any, Task, Any, Rows], Trainer],
    load_model: Callable[[], Any],
    task: Task,
    splits: Splits,
    args: TrainingConfig,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train what `load_model()` gives on `splits.train`, and evaluate it on `splits.test`, where there is one, before and after.

    `args.output_dir` becomes the run folder's, `args.resume_from_checkpoint` the checkpoint's or None, before the model is loaded.
    `settings`, {group: dataclass}, are what config.json and the report say; `args` is one of them. Writes the run folder, returns
    the headline numbers.
    Raises Interrupted after saving, where a signal asked to stop.
    """
    started = time.perf_counter()
    _check_weights(task, args)
    run = open_run(recipe, args.output_dir)
    args.output_dir = str(run.path)
    resume = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    args.resume_from_checkpoint = str(resume) if resume else None
    deciding = deciding_settings(settings.values(), args.world_size)
    identity = {"training": row_identity(splits.train), "held-out": row_identity(splits.test)}
    told = Manifest.read(resume) if resume else None
    if resume and told:
        check_same(resume, told, deciding, identity["training"])
    model, rows, test = load_model(), splits.train, splits.test
    if isinstance(args, PolicyConfig):
        reader = model.processor
        rows = readable_prompts(rows, task.prompt, reader, splits.on_bad_row, args.max_prompt_length)
        test = readable_prompts(test, task.prompt, reader, splits.on_bad_row) if test is not None else None
    groups = {name: group.to_dict() if group is args else asdict(group) for name, group in settings.items()}
    run.write_json("config.json", groups)
    trainer = trainer_class(model, task, args, rows)
    trainer.deciding, trainer.rows = deciding, identity
    logger.info("%s: %d training rows, on %s, output in %s", title, len(rows), describe_device(), run.path)

    evaluations = {}
    if test is not None:
        evaluations["before"] = _evaluate(trainer, task, test, run, "before", reuse=resume is not None)
    checkpoint = train_to_end(trainer, run, resume)
    if test is not None:
        evaluations["after"] = _evaluate(trainer, task, test, run, "after")

    metrics = run.read_metrics()
    headline: dict[str, Any] = {
        f"{name}_{when}": value_of(cell) for when, e in evaluations.items() for name, cell in e.measures.items()
    }
    headline |= evaluations["after"].baselines if evaluations else {}
    headline |= first_and_last(trainer.headline_metric, metrics) if trainer.headline_metric else {}
    headline |= {"seconds": time.perf_counter() - started, "checkpoint": checkpoint}
    if run.writes:
        write_curves(run.path / "curves.png", metrics)
        with alone(run.path / "report.html"):
            shown = {f"{when} training": evaluation for when, evaluation in evaluations.items()}
            samples = trainer.samples()
            if not samples and test is not None:
                samples = task.samples(evaluations["after"], test, trainer.answer)
            write_report(
                run.path / "report.html",
                title=title,
                headline=headline,
                settings=groups,
                rows=metrics,
                comparisons=comparisons(shown) if shown else [],
                tables=tables(shown) if shown else [],
                samples=samples,
                legend=task.legend,
                skipped=rows.skipped,
            )
    details = {
        f"{name}_{when}": {line: value_of(cell) for line, cell in lines.items()}
        for when, evaluation in evaluations.items()
        for name, lines in evaluation.details.items()
    }
    run.unlock()
    return headline | details


def _check_weights(task: Task, args: TrainingConfig) -> None:
    """InputError where `--reward_weights` has not one number for each of the task's rewards."""
    weights, names = getattr(args, "reward_weights", None), [reward.__name__ for reward in task.rewards]
    if weights is not None and len(weights) != len(names):
        raise InputError(
            f"--reward_weights {' '.join(map(str, weights))}: expected {len(names)} numbers, one for each of {', '.join(names)}"
        )


def train_to_end(trainer: Trainer, run: RunFolder, resume: Path | None) -> Path | None:
    """Train, from the checkpoint `resume` where there is one; returns the newest whole checkpoint, if any was saved.

    Raises Interrupted after saving, where a signal asked to stop.
    """
    stop = StopOnSignal()
    keep_quiet(trainer)  # RunLog takes their place
    trainer.add_callback(stop)
    trainer.add_callback(RunLog(run))
    first = Manifest.read(resume).step if resume else 0
    if resume:
        logger.info("resuming after step %d from %s", first, resume)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if resume and trainer.state.global_step == first and not stop.received:
        logger.info("%s: the run was at its end (step %d of %d): nothing was trained", resume, first, trainer.state.max_steps)
    checkpoint = newest_checkpoint(trainer.args.output_dir)
    if stop.received:
        raise Interrupted(f"stopped by a signal after step {trainer.state.global_step}; resume from {checkpoint}")
    return checkpoint


def keep_quiet(trainer: Trainer) -> None:
    """Without the callbacks of transformers that write to standard output, whose last line is the headline's."""
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)


def _evaluate(trainer: Trainer, task: Task, test: Rows, run: RunFolder, when: str, reuse: bool = False) -> Evaluation:
    """Greedy answers to held-out rows, kept as evaluation_<when>.json; with `reuse`, what is kept there of the same rows."""
    identity = row_identity(test)
    kept = run.path / f"evaluation_{when}.json"
    if reuse and kept.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # of a version that wrote otherwise
            known = Evaluation.read(kept)
            if known.summary["rows"] == identity:
                return known
    evaluation = evaluate(trainer.answer, task, test, batch_size=trainer.evaluation_batch_size, progress=run.writes)
    evaluation = replace(evaluation, summary=evaluation.summary | {"rows": identity})
    if run.writes:
        write_evaluation(run.path, task, evaluation, suffix=f"_{when}")
    log_measures(f"{when} training", evaluation)
    return evaluation


def first_and_last(metric: str, rows: list[dict]) -> dict[str, float | None]:
    """Its mean over the first and the last tenth of the logged steps: a single step's is mostly noise."""
    values = [row[metric] for row in rows if row.get(metric) is not None]
    tenth = max(1, len(values) // 10)
    if not values:
        return {f"{metric}_first": None, f"{metric}_last": None}
    return {f"{metric}_first": sum(values[:tenth]) / tenth, f"{metric}_last": sum(values[-tenth:]) / tenth}
