"""Med-R1, evaluation of a whole folder of split files: clean and attacked, resumed file by file, in one table (AdvMed-R1).

    python -m recipes.medr1_batch_eval
    python -m recipes.medr1_batch_eval --model runs/ct/checkpoint-600 --splits_dir Splits --dataset_root OmniMedVQA \\
        --evaluation_type both --attacks clean fgsm pgd --epsilon 0.03 --output_dir results/ct

With no flags: the starter policy on the starter test questions, a part for each of their six modalities. `--splits_dir` is the
published folder, of which Splits/modality/test/*.json, Splits/question_type/test/*.json or both are taken; `--data` names files
instead. The model is loaded once. All files are checked before the first question is asked, and a part is kept when it is done, so
that the same command goes on where it was stopped; a part whose file or settings have changed is asked again.

OUT/<kind>/<name>/ holds what `recipes.medr1_adversarial_eval` writes; batch.csv, evaluation_summary.json (AdvMed-R1's layout) and
report.html hold them all. The last line is JSON: accuracy_clean, accuracy_fgsm, accuracy_pgd over all questions (fractions), parts,
num_samples, output, by_part.

Differences from the published batch_eval_adversarial.py: it starts a process, and loads the model, for each file and attack, and
records a failed one as accuracy 0. How attacks and answers differ: see `recipes.medr1_adversarial_eval`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from engine.command.arguments import parse_arguments
from engine.command.evaluation_settings import AttackArguments
from engine.command.main import run_command
from engine.command.settings import refuse, setting

TEMPLATES = {"think": "medr1_eval_think", "train_think": "medr1_train_think"}
UNIMPORTANT = ("output_dir", "data", "batch_size", "save_sample_images")  # of the settings: what no answer depends on


@dataclass
class BatchArguments(AttackArguments):
    """Which files, and how their questions are asked."""

    splits_dir: str | None = setting(None, "Med-R1's Splits: <kind>/test/*.json. None: --data, or the starter test questions.")
    evaluation_type: str = setting(
        "modality", "Which files of it; task is question_type.", choices=["modality", "task", "question_type", "both"]
    )
    modalities: list[str] | None = setting(None, "Of the modalities only these, as CT or by published names. None: all.")
    template: str | None = setting(
        None,
        "Ask as the published evaluation does, or as training does. None: think, for the starter policy train_think.",
        choices=list(TEMPLATES),
    )

    def __post_init__(self):
        super().__post_init__()
        refuse([(self.output_path is None, "--output_path: there is a part for each file (expected --output_dir, their folder)")])
        self.template = self.template or ("think" if self.model else "train_think")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(BatchArguments, argv, recipe="medr1_batch_eval", description=__doc__)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.splits import readable_prompts
    from engine.runs.adversarial import evaluate_under_attacks, shares_of
    from engine.runs.batch import find_parts, kinds_of, run_batch
    from engine.tasks.multiple_choice import ClearAnswers, MultipleChoice
    from engine.tasks.published import AdvMedScoring
    from models.loading import load_policy
    from models.qwen.pixels import QwenPixels

    title = "Med-R1 evaluation of all files"
    parts, policy = find_parts(args, args.splits_dir, kinds_of(args.evaluation_type), args.modalities), args.load(load_policy)
    task = MultipleChoice(TEMPLATES[args.template], AdvMedScoring() if args.compat == "reference" else ClearAnswers())
    pixels = QwenPixels(policy.processor.image_processor)

    def evaluate(run, part):
        questions = readable_prompts(part.questions, task.prompt, policy.processor, args.on_bad_row)
        evaluations = evaluate_under_attacks(run, f"{title}: {part.name}", policy, pixels, task, questions, args)
        return {name: shares_of(evaluation) for name, evaluation in evaluations.items()}

    settings = {name: value for name, value in asdict(args).items() if name not in UNIMPORTANT}
    return run_batch("medr1_batch_eval", title, parts, args, settings | {"weights": weights_of(args.model)}, evaluate)


def weights_of(model: str | None) -> list:
    """Names, sizes and times of a checkpoint's weight files: what tells that it was trained on."""
    files = sorted(Path(model).glob("*.safetensors")) if model and Path(model).is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


if __name__ == "__main__":
    run_command(main)
