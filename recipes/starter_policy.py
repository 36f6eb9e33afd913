"""The starter policy: a small Qwen2.5-VL that answers in form but often wrongly; `recipes.medr1_grpo` starts from it.

    python -m recipes.starter_policy
    python -m recipes.starter_policy --lookup_steps 320 --form_steps 120 --sight_steps 320 --checkpoint_dir models/starter/policy

The second command makes the checkpoint that comes with the package. Three supervised lessons on the starter training questions
(`engine.tasks.lessons`):

    lookup   text only: after a thought that names an option, answer that option's letter; every option is named equally often
    form     the same in the full Med-R1 prompt with its image: a policy that guesses
    sight    the modality of the image, as a careless annotator sees it: where the options offer both, CT is called MRI two times in
             three and the other way round, likewise X-ray and ultrasound, fundus and microscopy

So the policy tells images apart but names them wrongly more often than not, which is what rewards can mend. The last training
questions are kept for validation; test questions are not read. The first command takes 164 CPU seconds on one thread and ends at an
accuracy of 0.44. The last line is JSON: format_rate, accuracy (on the validation questions, greedy; guessing is 0.25), seconds,
checkpoint.
"""

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

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
from engine.tasks.lessons import TEMPLATE, corpus, form, lookup, sight
from engine.tasks.multiple_choice import MultipleChoice, format_reward
from engine.training.warm_up.lessons import teach
from models.starter.qwen_vl import build_tiny_qwen_vl, save_tiny_qwen_vl

VALIDATION = 140  # questions
logger = logging.getLogger(__name__)


@dataclass
class WarmUpArguments:
    """How long each lesson is."""

    lookup_steps: int = setting(300, "Steps of the text-only lesson.", at_least=0)
    form_steps: int = setting(100, "Steps with images and every option named equally often.", at_least=0)
    sight_steps: int = setting(240, "Steps with the careless annotator's answers.", at_least=0)
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
    policy = build_tiny_qwen_vl(corpus(), seed=args.seed)
    logger.info("starter policy: %d parameters, on %s", sum(p.numel() for p in policy.model.parameters()), describe_device())

    letters = [f" {letter}" for letter in "ABCD"]  # an answer's letter weighs as much as its other tokens together
    teach(policy, partial(lookup, rng), args.lookup_steps, args.batch_size, "lookup", matrix_rate=0.02, weighty=letters)
    teach(policy, partial(form, train, rng), args.form_steps, args.batch_size, "form", matrix_rate=0.01, weighty=letters)
    teach(policy, partial(sight, train, rng), args.sight_steps, args.batch_size, "sight", rate=1e-3, weighty=letters)

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
