"""The starter policy: a small Qwen2.5-VL that answers in form but often wrongly; `recipes.medr1_grpo` starts from it.

    python -m recipes.starter_policy
    python -m recipes.starter_policy --look_steps 320 --lookup_steps 300 --form_steps 80 --sight_steps 240 \\
        --checkpoint_dir models/starter/policy

The second command makes the checkpoint that comes with the package. Four supervised lessons on the starter training questions
(`engine.tasks.lessons`):

    look     the modality of an image, without a question: the vision tower is kept as it is then, the rest is thrown away
    lookup   text only: after a thought that names an option, answer that option's letter; every option is named equally often
    form     the same in the full Med-R1 prompt with its image: a policy that guesses
    sight    the modality of the image, as a careless annotator sees it: where the options offer both, CT is called MRI two times in
             three and the other way round, likewise X-ray and ultrasound, fundus and microscopy

So the policy tells images apart but names many of them wrongly, which is what rewards can mend. Images are turned, mirrored and
cut: else the small tower learns where things lie in a source rather than what they look like, and held-out parts look otherwise.
The last training questions are kept for validation. Test questions are not trained on, but lessons and their lengths were chosen by
what became of them there. The first command takes 213 CPU seconds on one thread and ends at an accuracy of 0.50. The last line is
JSON: format_rate, accuracy (on the validation questions, greedy; guessing is 0.25), seconds, checkpoint.
"""

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import open_run
from engine.command.settings import setting
from engine.data.questions import load_questions
from engine.data.starter.questions import build_starter_data
from engine.device import describe_device, one_thread_if_small
from engine.rollout.answers import GreedyAnswers
from engine.runs.evaluate import evaluate
from engine.tasks.lessons import TEMPLATE, corpus, form, look, lookup, sight
from engine.tasks.multiple_choice import MultipleChoice, format_reward
from engine.training.warm_up.lessons import teach
from models.starter.qwen_vl import build_tiny_qwen_vl, save_tiny_qwen_vl

VALIDATION = 140  # questions
logger = logging.getLogger(__name__)


@dataclass
class WarmUpArguments:
    """How long each lesson is."""

    look_steps: int = setting(120, "Steps with images alone, for the vision tower.", at_least=0)
    lookup_steps: int = setting(140, "Steps of the text-only lesson.", at_least=0)
    form_steps: int = setting(40, "Steps with images and every option named equally often.", at_least=0)
    sight_steps: int = setting(100, "Steps with the careless annotator's answers.", at_least=0)
    batch_size: int = setting(16, "Questions a step; the first two lessons have four answers to each.", at_least=1)
    seed: int = setting(0, "Decides weights, questions and their order.", at_least=0)
    output_dir: str | None = setting(None, "Run folder. None: runs/starter_policy/<time>.")
    checkpoint_dir: str | None = setting(None, "Where the policy is written. None: checkpoint/ in the run folder.")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(WarmUpArguments, argv, recipe="starter_policy", description=__doc__)
    started, rng = time.perf_counter(), np.random.default_rng(args.seed)
    run = open_run("starter_policy", args.output_dir)
    run.write_json("config.json", asdict(args))
    questions = load_questions(build_starter_data() / "train.json")
    first_held_out = len(questions) - VALIDATION
    train, held_out = questions.select(range(first_held_out)), questions.select(range(first_held_out, len(questions)))
    one_thread_if_small(True, torch.device("cpu"))
    policy, sighted = (build_tiny_qwen_vl(corpus(), seed=args.seed) for _ in range(2))
    logger.info("starter policy: %d parameters, on %s", sum(p.numel() for p in policy.model.parameters()), describe_device())

    seen = np.random.default_rng(args.seed)
    teach(sighted, partial(look, train, seen), args.look_steps, args.batch_size, "look", rate=1e-3, matrix_rate=0.01)
    policy.base.model.visual.load_state_dict(sighted.base.model.visual.state_dict())
    policy.base.model.visual.requires_grad_(False)  # lessons that name any option, or the wrong one, would spoil it
    letters = [f" {letter}" for letter in "ABCD"]  # an answer's letter weighs as much as its other tokens together
    options: dict[str, Any] = {"batch_size": args.batch_size, "weighty": letters}
    teach(policy, partial(lookup, rng), args.lookup_steps, name="lookup", matrix_rate=0.02, **options)
    teach(policy, partial(form, train, rng), args.form_steps, name="form", matrix_rate=0.01, **options)
    teach(policy, partial(sight, train, rng), args.sight_steps, name="sight", rate=1e-3, matrix_rate=0.005, **options)

    folder = Path(args.checkpoint_dir or run.path / "checkpoint")
    save_tiny_qwen_vl(policy, folder)
    policy.model.eval()
    task = MultipleChoice(TEMPLATE)
    evaluation = evaluate(GreedyAnswers(policy, task.prompt, 40), task, held_out, batch_size=35)
    formed = format_reward(None, [result["model_output"] for result in evaluation.results])
    headline = {"format_rate": sum(formed) / len(formed), "accuracy": evaluation.headline["accuracy"]}
    return headline | {"seconds": time.perf_counter() - started, "checkpoint": str(folder)}


if __name__ == "__main__":
    run_command(main)
