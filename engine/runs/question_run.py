"""What a training run on multiple-choice questions does around its trainer: open, evaluate, train, evaluate again, report."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from engine.command.run import RunFolder, describe_device, open_run
from engine.command.settings import DataArguments, ModelArguments
from engine.data.questions import QuestionSet
from engine.data.splits import limit_prompts
from engine.errors import input_errors
from engine.evaluation.questions import Evaluation, evaluate, read_evaluation, write_evaluation
from engine.report.report import write_curves, write_report
from engine.rollout.policy import Policy
from engine.rollout.rollout import greedy_texts
from engine.runs.training_run import train_to_end
from engine.training.checkpoints import find_checkpoint

EVALUATION_BATCH = 32
logger = logging.getLogger(__name__)


def open_training(
    recipe: str,
    load_policy: Callable[..., Policy],
    arguments: tuple[Any, DataArguments, ModelArguments, TrainingArguments],
    prompt_of: Callable[[dict], list[dict]],
    train: QuestionSet,
) -> tuple[Policy, QuestionSet, RunFolder, dict]:
    """(what `load_policy(path or None, **options)` gives, the questions short enough, the run folder, all settings by group).

    The last of `arguments` has `max_prompt_length`, and learns its output folder.
    """
    task, data, model, args = arguments
    run = open_run(recipe, args.output_dir)
    args.output_dir = str(run.path)
    if model.model_name_or_path is None and args.use_cpu:
        torch.set_num_threads(1)  # matrices so small that a second thread mostly waits for the first
    with input_errors("--model_name_or_path"):
        policy = load_policy(model.model_name_or_path, **model.load_options(args.bf16))
    train = limit_prompts(train, prompt_of, policy.processor.prompt_length, args.max_prompt_length, data.on_bad_row)
    settings = {"task": asdict(task), "data": asdict(data), "model": asdict(model), "training": args.to_dict()}
    return policy, train, run, settings


def train_and_test(
    make_trainer: Callable[[], Trainer],
    args: TrainingArguments,
    prompt_of: Callable[[dict], list[dict]],
    train,
    test,
    run: RunFolder,
    *,
    title: str,
    settings: dict,
    compat: str,
    followed: str,
    samples_of: Callable[[Trainer, Evaluation | None], list[dict]],
) -> dict:
    """Train on a question set and write the run folder; `test` None: no evaluation. Returns the headline numbers.

    The trainer has a `policy` and these `args`, among them `max_completion_length`. `followed` is the metric whose first and last
    values are headline numbers; `samples_of(trainer, evaluation after training)` is what the report shows.
    Raises Interrupted after saving, where a signal asked to stop.
    """
    started = time.perf_counter()
    resume = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    run.write_json("config.json", settings)
    trainer = make_trainer()
    logger.info("%s: %d training questions, on %s, output in %s", title, len(train), describe_device(), run.path)

    before = test and _test(trainer, prompt_of, test, run, "before", compat, reuse=resume is not None)
    checkpoint = train_to_end(trainer, run, resume)
    after = test and _test(trainer, prompt_of, test, run, "after", compat)

    rows = run.read_metrics()
    tests = {when: e for when, e in [("before", before), ("after", after)] if e}
    headline = {f"accuracy_{when}": e.overall.accuracy for when, e in tests.items()}
    headline |= _first_and_last(followed, rows) | {"seconds": time.perf_counter() - started, "checkpoint": checkpoint}
    if run.writes:
        write_curves(run.path / "curves.png", rows)
        write_report(
            run.path / "report.html",
            title=title,
            headline=headline,
            settings=settings,
            rows=rows,
            samples=samples_of(trainer, after),
            evaluations={f"{when} training": e for when, e in tests.items()},
            skipped=train.skipped,
        )
    return headline | {f"by_modality_{when}": e.accuracies("modality") for when, e in tests.items()}


def _test(trainer: Trainer, prompt_of: Callable, test, run: RunFolder, when: str, compat: str, reuse: bool = False) -> Evaluation:
    """Greedy accuracy on held-out questions, kept as evaluation_<when>.json; a resumed run reuses what it knew before."""
    kept = run.path / f"evaluation_{when}.json"
    if reuse and kept.is_file():
        return read_evaluation(kept)
    trainer.model.eval()
    answer = partial(
        greedy_texts, trainer.policy, max_new_tokens=trainer.args.max_completion_length, batch_size=EVALUATION_BATCH, progress=False
    )
    with trainer.accelerator.autocast():
        result = evaluate(answer, test, template=prompt_of, batch_size=EVALUATION_BATCH, compat=compat, progress=run.writes)
    if run.writes:
        write_evaluation(run.path, result, suffix=f"_{when}")
    low, high = result.overall.interval
    logger.info(
        "accuracy %s training: %.1f %% (95 %% interval %.1f-%.1f, %d questions)", when, *_percent(result, low, high), len(test)
    )
    return result


def _percent(result: Evaluation, low: float, high: float) -> list[float]:
    return [100 * x for x in (result.overall.accuracy, low, high)]


def _first_and_last(metric: str, rows: list[dict]) -> dict:
    """Its mean over the first and the last tenth of the logged steps: a single step's is mostly noise."""
    values = [row[metric] for row in rows if row.get(metric) is not None]
    tenth = max(1, len(values) // 10)
    if not values:
        return {f"{metric}_first": None, f"{metric}_last": None}
    return {f"{metric}_first": sum(values[:tenth]) / tenth, f"{metric}_last": sum(values[-tenth:]) / tenth}
