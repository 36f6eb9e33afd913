"""Med-R1, evaluation: accuracy on medical multiple-choice questions (arXiv:2503.13939, section 4).

    python -m recipes.medr1_eval
    python -m recipes.medr1_eval --model runs/medr1_grpo/20261122-171455/checkpoint-100 \\
        --data Splits/modality/test/CT\\(Computed\\ Tomography\\)_test.json --image_root OmniMedVQA

With no flags: the starter policy, before any GRPO, on the 280 starter test questions; about 10 s on one CPU thread.
`--data` takes Med-R1's split files, JSONL, what `recipes.medr1_prepare` makes and save_to_disk folders. Answers are greedy. The run
folder gets evaluation.json (Med-R1's `accuracy` in percent and `results`, and `scores` as fractions with Wilson 95 % intervals,
overall, per modality and per question type), accuracy.png and report.html. The last line is JSON: accuracy, low, high (fractions),
num_samples, unanswered, output.

Differences from the published scripts: they count `C` alone as right, not `C)`, `(C)`, `c` or the option's text, read the first
answer instead of the last, and differ in this between templates; `--compat reference` reads as they do (see `engine.evaluate`).
`--template zeroshot` asks for a letter without tags, so there a bare letter counts. The templates are theirs, letter for letter;
their prompt of think differs from that of training. The starter policy, a small model that knows one prompt, and what is trained
from it must be asked as in training: `--template train_think`.
"""

import logging
from dataclasses import asdict, dataclass
from functools import partial

import torch

from engine.arguments import parse_arguments
from engine.data.questions import load_questions
from engine.data.starter import build_starter_data
from engine.errors import InputError, input_errors
from engine.evaluate import evaluate, write_evaluation
from engine.recipe_arguments import setting
from engine.report import evaluation_samples, write_report
from engine.rollout import greedy_texts
from engine.run import describe_device, local_device, open_run, run_command
from models.loading import load_policy

TEMPLATES = {
    "think": "medr1_eval_think",
    "nothink": "medr1_eval_nothink",
    "zeroshot": "medr1_zeroshot",
    "train_think": "medr1_train_think",
    "train_nothink": "medr1_train_nothink",
}
logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments:
    """What is asked of which model."""

    model: str | None = setting(None, "Checkpoint folder or hub name. None: the starter policy.")
    data: list[str] | None = setting(None, "Files or folders of questions. None: the starter test questions.")
    image_root: str | None = setting(None, "Folder that relative image paths start from. None: that of the file.")
    split: str = setting("test", "Split of a folder that holds several.")
    limit: int | None = setting(None, "Ask only the first so many questions.")
    on_bad_row: str = setting("error", "A bad row ends the run, or is skipped, counted and listed.", choices=["error", "skip"])
    template: str | None = setting(
        None,
        "Ask for reasoning, for a tagged answer, or for a bare letter; train_* ask as training does. None: think, for the starter "
        "policy train_think.",
        choices=list(TEMPLATES),
    )
    compat: str = setting("default", "Read answers well, or as the published scripts do.", choices=["default", "reference"])
    batch_size: int = setting(32, "Questions answered at once.")
    max_new_tokens: int = setting(256, "Longest answer in tokens.")
    max_pixels: int | None = setting(None, "Largest image area in pixels (Med-R1: 401408). None: the checkpoint's.")
    output_dir: str | None = setting(None, "Run folder. None: runs/medr1_eval/<time>.")

    def __post_init__(self):
        self.template = self.template or ("think" if self.model else "train_think")
        for name in ("batch_size", "max_new_tokens", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(EvaluationArguments, argv, recipe="medr1_eval", description=__doc__)
    sources = args.data or [build_starter_data()]
    questions = load_questions(sources, image_root=args.image_root, split=args.split, on_bad_row=args.on_bad_row, limit=args.limit)
    for line in questions.skipped:
        logger.warning("skipped: %s", line)
    device = local_device()
    if args.model is None and device.type == "cpu":
        torch.set_num_threads(1)  # matrices so small that a second thread mostly waits for the first
    with input_errors("--model"):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy = load_policy(args.model, dtype=dtype, max_pixels=args.max_pixels)
    policy.model.to(device).eval().requires_grad_(False)  # a frozen tower's image features are kept for the next question
    run = open_run("medr1_eval", args.output_dir)
    run.write_json("config.json", asdict(args))
    logger.info("Med-R1 evaluation: %d questions, on %s, output in %s", len(questions), describe_device(), run.path)

    answer = partial(greedy_texts, policy, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, progress=False)
    evaluation = evaluate(
        answer, questions, template=TEMPLATES[args.template], batch_size=args.batch_size, compat=args.compat, progress=run.writes
    )
    headline = evaluation.headline() | {"output": str(run.path)}
    if run.writes:
        write_evaluation(run.path, evaluation)
        write_report(
            run.path / "report.html",
            title="Med-R1 evaluation",
            headline=headline,
            settings=asdict(args),
            rows=[],
            samples=evaluation_samples(evaluation, questions),
            evaluations={f"of {args.model or 'the starter policy'}": evaluation},
            skipped=questions.skipped,
        )
    return headline


if __name__ == "__main__":
    run_command(main)
