"""MedVLM-R1: GRPO on radiology questions (arXiv:2502.19634, sections 2 and 3).

    python -m recipes.medvlm_r1_grpo
    torchrun --nproc_per_node=2 -m recipes.medvlm_r1_grpo --output_dir OUT --model_name_or_path Qwen/Qwen2-VL-2B-Instruct \\
        --dataset_name data/MR --bf16 --max_pixels 401408 --attn_implementation flash_attention_2

The second command has the published settings, four answers to a prompt and two epochs among them, which are this recipe's defaults.
In the paper 600 MRI questions took Qwen2-VL-2B from 55.11 % to 78.22 %, the mean over 300 questions each about MRI, CT and X-ray.
`recipes.medvlm_r1_prepare` makes data/MR, with these 900 as its test part (`--eval_limit 900` asks all of them, before and after).

With no flags it trains the starter policy (see `recipes.starter_policy`) on the MRI, CT and X-ray questions of the starter data.
It was warmed up with Med-R1's prompt and answers this one in the same form. Measured: from 35.3 % of 150 held-out questions to
94.7 % (MRI from 68 to 88 %, CT from 16 to 96 %, X-ray from 22 to 100 %), in three to nine minutes of one CPU thread and 1.4 GB. It
learns from all three, since its questions ask for the modality: MRI alone would teach it to say MRI. The last line is JSON:
accuracy_before and accuracy_after (greedy), by_modality_before and _after, reward_first and _last, seconds, checkpoint.

Differences from the published code (https://github.com/JZPeterPan/MedVLM-R1): a prompt is read once and its answers are sampled
together, instead of one `generate` after another; prompts, images, rewards and groups stay together with more than one prompt a
process; answers are sampled from the distribution they are scored under (no hidden top-k 50); all end tokens end an answer; a
prompt of more than 512 tokens (an image of about 600 x 600 pixels has 441) is an error, or skipped, where the published code counts
its end as part of the answer: raise --max_prompt_length for larger images. The default reward accepts `C)`, `(C)`, lower case and
the option's text, and reads the last answer. `--compat reference` gives the published 1, 0.5 or 0, which counts letters inside
words: `CT` is half right for C, `Option C` wrong. ISIC, SLAKE and VQA-RAD, which its code can load too, are other data: any
`--dataset_name` in a format of `engine.data.questions` will do.
"""

from dataclasses import dataclass
from functools import partial

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import DataArguments, ModelArguments, setting
from engine.data.split_names import RADIOLOGY
from engine.training.config.grpo import STARTER, GRPOConfig

TEMPLATE = "medvlm_train_complex"
SELECTIONS = {"MR": ("MRI",), "CT": ("CT",), "XRAY": ("X-Ray",), "COMBINED": RADIOLOGY}  # by their published names
# The published training script, where it differs from GRPOConfig's defaults.
PUBLISHED = {"max_prompt_length": 512, "max_completion_length": 512, "num_train_epochs": 2, "save_steps": 50}


@dataclass
class MedVLMArguments:
    """The task."""

    dataset_selection: str | None = setting(
        None, "Train on these questions alone; tested on all. None: all.", choices=list(SELECTIONS)
    )
    compat: str = setting("default", "Score answers well, or exactly as the published code does.", choices=["default", "reference"])


def main(argv: list[str]) -> dict:
    kinds = (MedVLMArguments, DataArguments, ModelArguments, GRPOConfig)
    own, data, model, args = parse_arguments(
        kinds, argv, recipe="medvlm_r1_grpo", description=__doc__, defaults=PUBLISHED, starter=STARTER
    )

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.splits import load_splits
    from engine.runs.train import train
    from engine.tasks.multiple_choice import MultipleChoice
    from engine.tasks.published import scoring
    from engine.training.grpo import GRPOTrainer
    from models.loading import load_policy

    return train(
        "medvlm_r1_grpo",
        "MedVLM-R1 GRPO",
        GRPOTrainer,
        partial(model.load, load_policy, args.bf16, use_cpu=args.use_cpu),
        MultipleChoice(TEMPLATE, scoring(TEMPLATE, own.compat)),
        load_splits(data, RADIOLOGY, SELECTIONS[own.dataset_selection] if own.dataset_selection else None),
        args,
        settings={"task": own, "data": data, "model": model, "training": args},
    )


if __name__ == "__main__":
    run_command(main)
