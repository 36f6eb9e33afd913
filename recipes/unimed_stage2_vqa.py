"""Uni-MedVLM, stage 2: the language model learns to answer questions about images and their regions (LoRA).

    python -m recipes.unimed_stage2_vqa
    torchrun --nproc_per_node=8 -m recipes.unimed_stage2_vqa --stage1 OUT1/stage1_projector_cvfm.bin --output_dir OUT2 \\
        --dataset_name SAMed2Dv1/train/MeCoVQA-Complex.json SAMed2Dv1/train/MeCoVQA-Region.json --image_root SAMed2Dv1 \\
        --model_name_or_path meta-llama/Llama-3.1-8B-Instruct \\
        --vision_tower openai/clip-vit-large-patch14-336 --convnext facebook/convnext-large-384 \\
        --sam_ckpt sam-med2d_b.pth --deepspeed recipes/deepspeed/zero2_offload.json

LoRA of rank 128 on the language model's seven projections; beside it the region adapter learns, which makes one token of a region.
The run folder gets `stage2/`, a PEFT folder (adapter_model.safetensors, adapter_config.json) with the region adapter in
non_lora_trainables.bin. `--stage1`: by default what the newest run of `recipes.unimed_stage1_align` left. The published settings
are the defaults: 2e-4, one epoch, 2 questions x 32 passes a step.

With no flags: the small networks of stage 1, on 1200 starter questions.

The last line is JSON: accuracy, closed_accuracy, open_recall, open_f1, rougeL and others, each _before and _after, of held-out
questions; loss_first and loss_last, seconds, checkpoint, artifact.

Differences from the published code (https://github.com/AmberGTP5/MedPLIB_FILA): a region is seen, and not its file's name read as
text; an answer ends with the language model's own end token, not with another's; an image has one place in the prompt, not two.
"""

from dataclasses import dataclass

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import DataArguments, setting
from engine.command.unimed_settings import NetworkArguments, left_by
from engine.training.config.grounding import GroundingConfig

PUBLISHED = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 32,
    "save_steps": 500,
    "lora_r": 128,
    "lora_alpha": 256,
}
# What a run without flags uses instead: its networks are small.
STARTER = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_completion_length": 32,
    "max_steps": 120,
    "save_steps": 60,
    "save_total_limit": 2,
    "lora_r": 16,
    "lora_alpha": 32,
}


@dataclass
class Stage2Arguments(NetworkArguments):
    """What is trained, and from where."""

    stage1: str | None = setting(None, "What stage 1 left. None: that of its newest run.", metavar="FILE")
    lora_r: int = setting(128, "LoRA rank.", at_least=1, at_most=4096)
    lora_alpha: int = setting(256, "LoRA scale: updates are multiplied by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = setting(0.05, "Dropout on the input of the adapters.", at_least=0, less_than=1)


def main(argv: list[str]) -> dict:
    kinds, shared = (Stage2Arguments, DataArguments, GroundingConfig), {"defaults": PUBLISHED, "starter": STARTER}
    own, data, args = parse_arguments(kinds, argv, recipe="unimed_stage2_vqa", description=__doc__, **shared)
    stage1 = left_by(1, own.stage1)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.mecovqa.splits import load_mecovqa_splits
    from engine.errors import input_errors
    from engine.runs.train import train
    from engine.tasks.mecovqa.task import MeCoVQATask
    from engine.training.grounding import GroundingTrainer
    from engine.training.warm_up.unimed import small_networks
    from models.starter.uni_medvlm import build_tiny_unimed
    from models.uni_medvlm.checkpoints.loading import load_pretrained
    from models.uni_medvlm.checkpoints.networks import build_unimed
    from models.uni_medvlm.experts import ExpertLoRA
    from models.uni_medvlm.stages.artifacts import load_stage1, save_stage2
    from models.uni_medvlm.stages.trainable import prepare_stage

    loaded = []

    def load():
        policy = own.load(build_unimed, load_pretrained, lambda: small_networks(build_tiny_unimed), args)
        with input_errors("--stage1"):
            load_stage1(policy.model, stage1)
        prepare_stage(policy.model, 2, ExpertLoRA(own.lora_r, own.lora_alpha, own.lora_dropout))
        loaded.append(policy.model)
        return policy

    headline = train(
        "unimed_stage2_vqa",
        "Uni-MedVLM, stage 2: questions",
        GroundingTrainer,  # in every process all that learns has a gradient, also where no row has an image
        load,
        MeCoVQATask(),
        load_mecovqa_splits(data, ["complex", "region"]),
        args,
        settings={"networks": own, "data": data, "training": args},
    )
    folder = f"{args.output_dir}/stage2"
    return headline | {"artifact": str(save_stage2(loaded[0], folder)) if args.should_save else None}


if __name__ == "__main__":
    run_command(main)
