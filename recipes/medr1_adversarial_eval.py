"""Med-R1, adversarial evaluation: accuracy on clean images and under FGSM and PGD (AdvMed-R1's study of arXiv:2503.13939).

    python -m recipes.medr1_adversarial_eval
    python -m recipes.medr1_adversarial_eval --model runs/ct/checkpoint-600 --data Splits/modality/test/*.json \\
        --image_root OmniMedVQA --epsilon 0.03 --pgd_alpha 0.01 --pgd_iters 10

With no flags: the starter policy on the 300 starter test questions, in a minute on one CPU thread: 69.0 % on clean images, 45.0 %
under FGSM and 39.0 % under PGD. The second command does in one process what the published batch_eval_adversarial.py does with one
for each file and attack; `--attacks fgsm` chooses, clean images are always asked about. The published flags --model_path,
--test_data, --dataset_root and --attack_type work too. The last line is JSON: accuracy_clean, accuracy_fgsm, accuracy_pgd
(fractions), num_samples, output, by_modality. What the run folder holds: see `engine.runs.adversarial`.

Differences from the published code, whose attacks end in an error in the first batch and are recorded as accuracy 0: an attack
lowers the probability of the whole right answer, reasoning included, and not of its first token, which is always `<think>` (on the
starter policy that attack does nothing); a question answered wrongly is left alone, since an attacker may leave an image as it is;
--epsilon and --pgd_alpha are fractions of a pixel's range, not of a channel's standard deviation; answers are read as
`recipes.medr1_eval` reads them. `--compat reference` takes these back. Attacked images have whole levels, as a file has, and many
are attacked at once. The starter policy and what is trained from it must be asked as in training: `--template train_think`.
"""

from dataclasses import dataclass

from engine.command.arguments import parse_arguments
from engine.command.evaluation_settings import AttackArguments
from engine.command.main import run_command
from engine.command.settings import setting

TEMPLATES = {"think": "medr1_eval_think", "train_think": "medr1_train_think"}


@dataclass
class AdversarialArguments(AttackArguments):
    """How questions are asked."""

    template: str | None = setting(
        None,
        "Ask as the published evaluation does, or as training does. None: think, for the starter policy train_think.",
        choices=list(TEMPLATES),
    )

    def __post_init__(self):
        super().__post_init__()
        self.template = self.template or ("think" if self.model else "train_think")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(AdversarialArguments, argv, recipe="medr1_adversarial_eval", description=__doc__)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.splits import readable_prompts
    from engine.runs.adversarial import run_adversarial_evaluation
    from engine.runs.evaluate import load_questions_of, start_evaluation
    from engine.tasks.multiple_choice import ClearAnswers, MultipleChoice
    from engine.tasks.published import AdvMedScoring
    from models.loading import load_policy
    from models.qwen.pixels import QwenPixels

    title = "Med-R1 adversarial evaluation"
    questions, policy = load_questions_of(args), args.load(load_policy)
    task = MultipleChoice(TEMPLATES[args.template], AdvMedScoring() if args.compat == "reference" else ClearAnswers())
    questions = readable_prompts(questions, task.prompt, policy.processor, args.on_bad_row)
    run = start_evaluation("medr1_adversarial_eval", title, questions, args)
    return run_adversarial_evaluation(run, title, policy, QwenPixels(policy.processor.image_processor), task, questions, args)


if __name__ == "__main__":
    run_command(main)
