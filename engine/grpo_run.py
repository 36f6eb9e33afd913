"""A GRPO run from start to end: evaluate, train, evaluate again, report. Recipes bring the model, the data and the rewards.

`train_on_questions` is the main of a recipe about multiple-choice questions, `run_grpo` that of any.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from engine.checkpoints import find_checkpoint
from engine.data.questions import QuestionSet
from engine.data.splits import limit_prompts
from engine.data.templates import build_prompt
from engine.errors import input_errors
from engine.evaluate import Evaluation, evaluate, read_evaluation, write_evaluation
from engine.grpo import GRPOTrainer
from engine.grpo_config import GRPOConfig
from engine.policy import Policy
from engine.recipe_arguments import DataArguments, ModelArguments
from engine.report import write_curves, write_report
from engine.rollout import greedy_texts
from engine.run import RunFolder, describe_device, open_run
from engine.training_run import train_to_end

EVALUATION_BATCH = 32
# What a run without flags uses instead of the papers' settings: the starter policy is small and starts from little.
STARTER = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_completion_length": 32,
    "max_steps": 120,
    "save_steps": 60,
    "save_total_limit": 2,
}
logger = logging.getLogger(__name__)


def train_on_questions(
    recipe: str,
    title: str,
    load_policy: Callable[..., Policy],
    arguments: tuple[Any, DataArguments, ModelArguments, GRPOConfig],
    *,
    splits: tuple[QuestionSet, QuestionSet | None],
    template: str,
    reward_funcs: list[Callable],
) -> dict:
    """Train what `load_policy(path or None, **options)` gives on `splits` (train, test), asked by `template`; see `run_grpo`.

    The first of `arguments` is the recipe's own dataclass, which has `compat`.
    """
    task, data, model, args = arguments
    run = open_run(recipe, args.output_dir)
    args.output_dir = str(run.path)
    if model.model_name_or_path is None and args.use_cpu:
        torch.set_num_threads(1)  # matrices so small that a second thread mostly waits for the first
    with input_errors("--model_name_or_path"):
        policy = load_policy(model.model_name_or_path, **model.load_options(args.bf16))
    prompt_of, (train, test) = partial(build_prompt, template), splits
    train = limit_prompts(train, prompt_of, policy.processor.prompt_length, args.max_prompt_length, data.on_bad_row)
    settings = {"task": asdict(task), "data": asdict(data), "model": asdict(model), "training": args.to_dict()}
    return run_grpo(policy, reward_funcs, prompt_of, args, train, test, run, title=title, settings=settings, compat=task.compat)


def run_grpo(
    policy: Policy,
    reward_funcs: list[Callable],
    prompt_of: Callable[[dict], list[dict]],
    args: GRPOConfig,
    train,
    test,
    run: RunFolder,
    *,
    title: str,
    settings: dict,
    compat: str = "default",
) -> dict:
    """Train `policy` on a question set and write the run folder; `test` None: no evaluation. Returns the headline numbers.

    Raises Interrupted after saving, where a signal asked to stop.
    """
    started = time.perf_counter()
    resume = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    run.write_json("config.json", settings)
    trainer = GRPOTrainer(policy, reward_funcs, prompt_of, args, train)
    logger.info("%s: %d training questions, on %s, output in %s", title, len(train), describe_device(), run.path)

    before = test and _test(trainer, prompt_of, test, run, "before", compat, reuse=resume is not None)
    checkpoint = train_to_end(trainer, run, resume)
    after = test and _test(trainer, prompt_of, test, run, "after", compat)

    rows = run.read_metrics()
    tests = {when: e for when, e in [("before", before), ("after", after)] if e}
    headline = {f"accuracy_{when}": e.overall.accuracy for when, e in tests.items()}
    headline |= _first_and_last_reward(rows) | {"seconds": time.perf_counter() - started, "checkpoint": checkpoint}
    if run.writes:
        evaluations = {f"{when} training": e for when, e in tests.items()}
        samples = trainer.step_log.samples
        write_curves(run.path / "curves.png", rows)
        report = run.path / "report.html"
        write_report(
            report,
            title=title,
            headline=headline,
            settings=settings,
            rows=rows,
            samples=samples,
            evaluations=evaluations,
            skipped=train.skipped,
        )
    return headline | {f"by_modality_{when}": e.accuracies("modality") for when, e in tests.items()}


def _test(
    trainer: GRPOTrainer, prompt_of: Callable, test, run: RunFolder, when: str, compat: str, reuse: bool = False
) -> Evaluation:
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


def _first_and_last_reward(rows: list[dict]) -> dict:
    """Mean reward over the first and the last tenth of the logged steps: a single step's is mostly noise."""
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    tenth = max(1, len(rewards) // 10)
    if not rewards:
        return {"reward_first": None, "reward_last": None}
    return {"reward_first": sum(rewards[:tenth]) / tenth, "reward_last": sum(rewards[-tenth:]) / tenth}
