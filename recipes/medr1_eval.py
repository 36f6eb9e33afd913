"""Med-R1, evaluation: accuracy on medical multiple-choice questions (arXiv:2503.13939, section 4).

    python -m recipes.medr1_eval
    python -m recipes.medr1_eval --model runs/medr1_grpo/20261122-171455/checkpoint-100 \\
        --data Splits/modality/test/CT\\(Computed\\ Tomography\\)_test.json --image_root OmniMedVQA

With no flags: the starter policy, before any GRPO, on the 300 starter test questions; about 10 s on one CPU thread.
`--data` takes Med-R1's split files, JSONL, what `recipes.medr1_prepare` makes and save_to_disk folders. Answers are greedy. The run
folder gets evaluation.json (Med-R1's `accuracy` in percent and `results`, and `scores` as fractions with Wilson 95 % intervals,
overall, per modality and per question type), accuracy.png and report.html. The last line is JSON: accuracy, low, high (fractions),
num_samples, unanswered, output, by_modality.

Differences from the published scripts: they count `C` alone as right, not `C)`, `(C)`, `c` or the option's text, read the first
answer instead of the last, and differ in this between templates; `--compat reference` reads as they do (see
`engine.tasks.published`). `--template zeroshot` asks for a letter without tags, so there a bare letter counts. The templates
are theirs, letter for letter; their prompt of think differs from that of training. The starter policy, a small model that knows one
prompt, and what is trained from it must be asked as in training: `--template train_think`.
"""

from dataclasses import dataclass

from engine.command.arguments import parse_arguments
from engine.command.evaluation_settings import QuestionArguments
from engine.command.main import run_command
from engine.command.settings import setting

TEMPLATES = {
    "think": "medr1_eval_think",
    "nothink": "medr1_eval_nothink",
    "zeroshot": "medr1_zeroshot",
    "train_think": "medr1_train_think",
    "train_nothink": "medr1_train_nothink",
    "sft": "medr1_sft",
}


@dataclass
class EvaluationArguments(QuestionArguments):
    """What is asked of which model."""

    template: str | None = setting(
        None,
        "Ask for reasoning, for a tagged answer, or for a bare letter; train_* ask as training does, sft as the "
        "published fine-tuning does. None: think, for the starter policy train_think.",
        choices=list(TEMPLATES),
    )

    def __post_init__(self):
        super().__post_init__()
        self.template = self.template or ("think" if self.model else "train_think")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(EvaluationArguments, argv, recipe="medr1_eval", description=__doc__)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.runs.evaluate import evaluate_questions
    from models.loading import load_policy

    return evaluate_questions("medr1_eval", "Med-R1 evaluation", load_policy, TEMPLATES[args.template], args)


if __name__ == "__main__":
    run_command(main)
