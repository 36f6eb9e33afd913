"""A GRPO run from start to end: evaluate, train, evaluate again, report. Recipes bring the model, the data and the rewards.

`train_on_questions` is the main of a recipe about multiple-choice questions, `run_grpo` that of any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from engine.command.run import RunFolder
from engine.command.settings import DataArguments, ModelArguments
from engine.data.questions import QuestionSet
from engine.rollout.policy import Policy
from engine.runs.question_run import open_training, train_and_test
from engine.tasks.templates import build_prompt
from engine.training.grpo import GRPOTrainer
from engine.training.grpo_config import GRPOConfig

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
    task, *_, args = arguments
    prompt_of, (train, test) = partial(build_prompt, template), splits
    policy, train, run, settings = open_training(recipe, load_policy, arguments, prompt_of, train)
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
    return train_and_test(
        partial(GRPOTrainer, policy, reward_funcs, prompt_of, args, train),
        args,
        prompt_of,
        train,
        test,
        run,
        title=title,
        settings=settings,
        compat=compat,
        followed="reward",
        samples_of=lambda trainer, after: trainer.step_log.samples,
    )
