"""An evaluation from start to end: read questions, ask a policy, write scores and a report. Recipes bring model and template."""

import logging
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial

import torch

from engine.command.run import RunFolder, describe_device, local_device, open_run
from engine.command.settings import setting
from engine.data.questions import QuestionSet, load_questions
from engine.data.starter.questions import build_starter_data
from engine.errors import InputError, input_errors
from engine.evaluation.questions import evaluate, write_evaluation
from engine.report.report import evaluation_samples, write_report
from engine.rollout.policy import Policy
from engine.rollout.rollout import greedy_texts

logger = logging.getLogger(__name__)


@dataclass
class QuestionArguments:
    """Which model answers which questions."""

    model: str | None = setting(None, "Checkpoint folder or hub name. None: the starter policy.")
    data: list[str] | None = setting(None, "Files or folders of questions. None: the starter test questions.")
    image_root: str | None = setting(None, "Folder that relative image paths start from. None: that of the file.")
    split: str = setting("test", "Split of a folder that holds several.")
    limit: int | None = setting(None, "Ask only the first so many questions.")
    on_bad_row: str = setting("error", "A bad row ends the run, or is skipped, counted and listed.", choices=["error", "skip"])
    compat: str = setting("default", "Read answers well, or as the published scripts do.", choices=["default", "reference"])
    batch_size: int = setting(32, "Questions answered at once.")
    max_new_tokens: int = setting(256, "Longest answer in tokens.")
    max_pixels: int | None = setting(None, "Largest image area in pixels (as in training: 401408). None: the checkpoint's.")
    output_dir: str | None = setting(None, "Run folder. None: runs/<recipe>/<time>.")

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")


def run_evaluation(
    recipe: str,
    title: str,
    load_policy: Callable[..., Policy],
    args: QuestionArguments,
    *,
    template: str,
    modalities: Collection[str] | None = None,
) -> dict:
    """Ask what `load_policy(path or None, **options)` gives by `template`, write the run folder and return the headline numbers.

    `modalities`: ask only about these (short names).
    """
    questions, policy, run = open_evaluation(recipe, title, load_policy, args, modalities)
    answer = partial(greedy_texts, policy, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, progress=False)
    evaluation = evaluate(answer, questions, template=template, batch_size=args.batch_size, compat=args.compat, progress=run.writes)
    headline = evaluation.headline() | {"output": str(run.path)}
    if run.writes:
        write_evaluation(run.path, evaluation)
        write_report(
            run.path / "report.html",
            title=title,
            headline=headline,
            settings=asdict(args),
            rows=[],
            samples=evaluation_samples(evaluation, questions),
            evaluations={f"of {args.model or 'the starter policy'}": evaluation},
            skipped=questions.skipped,
        )
    return headline | {"by_modality": {name: score.as_dict() for name, score in evaluation.by("modality").items()}}


def open_evaluation(
    recipe: str, title: str, load_policy: Callable[..., Policy], args: QuestionArguments, modalities: Collection[str] | None = None
) -> tuple[QuestionSet, Policy, RunFolder]:
    """The questions, the policy on its device, frozen and in eval mode, and a run folder that has config.json."""
    sources = args.data or [build_starter_data()]
    reading = {"image_root": args.image_root, "split": args.split, "on_bad_row": args.on_bad_row, "limit": args.limit}
    questions = load_questions(sources, modalities=modalities, **reading)
    for line in questions.skipped:
        logger.warning("skipped: %s", line)
    device = local_device()
    if args.model is None and device.type == "cpu":
        torch.set_num_threads(1)  # matrices so small that a second thread mostly waits for the first
    with input_errors("--model"):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy = load_policy(args.model, dtype=dtype, max_pixels=args.max_pixels)
    policy.model.to(device).eval().requires_grad_(False)  # a frozen tower's image features are kept for the next question
    run = open_run(recipe, args.output_dir)
    run.write_json("config.json", asdict(args))
    logger.info("%s: %d questions, on %s, output in %s", title, len(questions), describe_device(), run.path)
    return questions, policy, run
