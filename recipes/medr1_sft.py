"""Med-R1, supervised fine-tuning: the baseline that is shown the right letters (arXiv:2503.13939, section 4).

    python -m recipes.medr1_sft
    torchrun --nproc_per_node=2 -m recipes.medr1_sft --output_dir OUT --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \\
        --dataset_name data/CT_384 --max_pixels 401408

The second command has the published settings, which are the defaults: one epoch, 4 questions x 16 passes a step, 2e-5 with a tenth
of warm-up and a cosine, bfloat16, activations computed again. Asked as in GRPO without thought (`medr1_train_nothink`, the image
first), the model learns `<answer> C </answer>`, so that the two differ in training alone; `recipes.medr1_eval --template
train_nothink` asks the same. The loss is that of the answer's tokens and its end, averaged over all those of a step.

With no flags it trains the starter policy on the starter questions (see `recipes.starter_policy`). That small model finds a letter
only by way of a thought that names the option: asked for the letter alone it had got to 45 % after 200 steps of 16. So here, and
only here, its prompt is the one that asks for a thought (`--template train_think`), and what it learns has the right option's name,
which the published data do not hold: `<think>The picture looks like MRI.</think><answer> C </answer>`. Measured: held-out accuracy
from 69.0 % to 96.7 %, in 40 to 70 CPU seconds of one thread and 0.95 GB. `recipes.medr1_grpo` reaches 91.7 % from rewards alone.

Rows that have answers of their own are taught these, reasoning and all: a column `completion` (as `recipes.medvlm_r1_distill`
writes it: `--dataset_name runs/medvlm_r1_distill/<time>`) with `<think>...</think><answer> C </answer>`, or `thinking` with the
reasoning alone. They are then asked for a thought (`--template train_think`), unless their answers have none.

The last line is JSON: accuracy_before and accuracy_after (greedy), by_modality_before and _after, loss_first and _last (nats a
token), seconds, checkpoint.

Differences from the published code (https://github.com/Yuxiang-Lai117/Med-R1, sft.py and sft_2_5.py): its target begins with the
word None, the value of a column `thinking` that the published data lack; the task stands in a system message and the question
before its image; and the loss counts the tokens of the prompt too, and the start of another turn that follows the answer.
`--compat reference` has that prompt and that target (`recipes.medr1_eval --template sft` asks the same); the loss stays on the
answer, since counting prompts teaches a model to write questions. The last questions of an epoch that do not fill a step are left
out (each epoch has its own order).
"""

from dataclasses import dataclass
from functools import partial

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import DataArguments, ModelArguments, setting
from engine.training.config.sft import SFTConfig

# What a run without flags uses instead of the published settings: the starter policy is small and already speaks in form. Its
# vision tower stays: with it moving, 200 steps came to 79.0 %.
STARTER = {
    "freeze_vision_modules": True,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_completion_length": 32,
    "max_steps": 100,
    "save_steps": 50,
    "save_total_limit": 2,
}


@dataclass
class MedR1SFTArguments:
    """The task."""

    compat: str = setting(
        "default", "Learn the tagged letter, or the prompt and target of the published code.", choices=["default", "reference"]
    )


def main(argv: list[str]) -> dict:
    kinds = (MedR1SFTArguments, DataArguments, ModelArguments, SFTConfig)
    own, data, model, args = parse_arguments(kinds, argv, recipe="medr1_sft", description=__doc__, starter=STARTER)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.splits import load_splits
    from engine.runs.train import train
    from engine.tasks.completions.targets import check_own_answers, taught_form
    from engine.training.sft import SFTTrainer
    from models.loading import load_policy

    starts_small = data.dataset_name is None and model.model_name_or_path is None
    splits = load_splits(data)
    splits = splits._replace(train=check_own_answers(splits.train, data.on_bad_row))
    return train(
        "medr1_sft",
        "Med-R1 supervised fine-tuning",
        SFTTrainer,
        partial(model.load, load_policy, args.bf16, use_cpu=args.use_cpu),
        task(own.compat, starts_small, taught_form(splits.train)),
        splits,
        args,
        settings={"task": own, "data": data, "model": model, "training": args},
    )


def task(compat: str, starts_small: bool, form: str | None = None):
    """What is asked and what is learnt: as published, in the form that the starter policy knows or the rows' own answers have."""
    from engine.tasks.completions.targets import TEMPLATES, own_answer, own_thought_then_letter
    from engine.tasks.lessons import TEMPLATE, right_response
    from engine.tasks.multiple_choice import MultipleChoice
    from engine.tasks.published import scoring

    if compat == "reference":
        return MultipleChoice("medr1_sft", scoring("medr1_sft", compat), own_thought_then_letter)
    if starts_small:
        return MultipleChoice(TEMPLATE, target_of=right_response)
    return MultipleChoice(TEMPLATES[form or "nothink"], target_of=own_answer)


if __name__ == "__main__":
    run_command(main)
