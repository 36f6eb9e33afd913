"""A supervised fine-tuning run from start to end: evaluate, train, evaluate again, report. Recipes bring model and answers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from engine.command.settings import DataArguments, ModelArguments
from engine.data.questions import QuestionSet
from engine.report.report import evaluation_samples
from engine.rollout.policy import Policy
from engine.runs.question_run import open_training, train_and_test
from engine.tasks.templates import build_prompt
from engine.training.sft import SFTTrainer
from engine.training.sft_config import SFTConfig


def tune_on_questions(
    recipe: str,
    title: str,
    load_policy: Callable[..., Policy],
    arguments: tuple[Any, DataArguments, ModelArguments, SFTConfig],
    *,
    splits: tuple[QuestionSet, QuestionSet | None],
    template: str,
    answer_of: Callable[[dict], str],
) -> dict:
    """Teach what `load_policy(path or None, **options)` gives to answer `answer_of(row)` when asked by `template`.

    `splits` are (train, test); test None: no evaluation. The first of `arguments` is the recipe's own dataclass with `compat`.
    Writes the run folder and returns the headline numbers. Raises Interrupted after saving, where a signal asked to stop.
    """
    task, *_, args = arguments
    prompt_of, (train, test) = partial(build_prompt, template), splits
    policy, train, run, settings = open_training(recipe, load_policy, arguments, prompt_of, train)
    return train_and_test(
        partial(SFTTrainer, policy, prompt_of, answer_of, args, train),
        args,
        prompt_of,
        train,
        test,
        run,
        title=title,
        settings=settings,
        compat=task.compat,
        followed="loss",
        samples_of=lambda trainer, after: evaluation_samples(after, test) if after else [],
    )
