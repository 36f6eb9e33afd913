"""Uni-MedVLM, stage 1: image and language are aligned on captions; projector and CVFMs learn, all else is frozen.

    python -m recipes.unimed_stage1_align
    torchrun --nproc_per_node=8 -m recipes.unimed_stage1_align --output_dir OUT --dataset_name captions.jsonl --image_root data \\
        --model_name_or_path meta-llama/Llama-3.1-8B-Instruct \\
        --vision_tower openai/clip-vit-large-patch14-336 --convnext facebook/convnext-large-384 \\
        --sam_ckpt sam-med2d_b.pth --deepspeed recipes/deepspeed/zero2_offload.json

The prompt is the image alone, the answer its caption and the language model's end token. The run folder gets
`stage1_projector_cvfm.bin`, with the published keys, which stages 2 and 3 start from. The published settings are the defaults:
1e-3, 2 captions x 32 passes a step, a linear fall after a twentieth of warm-up.

With no flags it aligns small networks, whose language model was told what images show in words and whose towers have seen some
(engine/training/warm_up/unimed.py; made once, in two minutes), on 600 captions of real crops with drawn lesions.

The last line is JSON: loss_before and loss_after (nats a token of held-out captions), open_exact, rougeL, bleu and others _before
and _after, loss_first and loss_last, seconds, checkpoint, artifact.

Differences from the published code (https://github.com/AmberGTP5/MedPLIB_FILA): gradients reach the CVFMs, which it runs without
any; captions have an end; steps are optimizer steps (its 20,000 are passes, 625 steps, all of them within its warm-up); a CVFM
begins as the identity (`--compat reference`: with its LayerNorm).
"""

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import DataArguments
from engine.command.unimed_settings import NetworkArguments
from engine.training.config.sft import SFTConfig

PUBLISHED = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 32,
}
# What a run without flags uses instead: its networks are small.
STARTER = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_completion_length": 32,
    "max_steps": 80,
    "save_steps": 40,
    "save_total_limit": 2,
}


def main(argv: list[str]) -> dict:
    kinds, shared = (NetworkArguments, DataArguments, SFTConfig), {"defaults": PUBLISHED, "starter": STARTER}
    networks, data, args = parse_arguments(kinds, argv, recipe="unimed_stage1_align", description=__doc__, **shared)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.mecovqa.splits import load_caption_splits
    from engine.runs.train import train
    from engine.tasks.mecovqa.task import CaptionTask
    from engine.training.captions import CaptionTrainer
    from engine.training.warm_up.unimed import small_networks
    from models.starter.uni_medvlm import build_tiny_unimed
    from models.uni_medvlm.checkpoints.loading import load_pretrained
    from models.uni_medvlm.checkpoints.networks import build_unimed
    from models.uni_medvlm.stages.artifacts import save_stage1
    from models.uni_medvlm.stages.trainable import prepare_stage

    loaded = []

    def load():
        policy = networks.load(build_unimed, load_pretrained, lambda: small_networks(build_tiny_unimed), args)
        prepare_stage(policy.model, 1)
        loaded.append(policy.model)
        return policy

    headline = train(
        "unimed_stage1_align",
        "Uni-MedVLM, stage 1: alignment",
        CaptionTrainer,
        load,
        CaptionTask(),
        load_caption_splits(data),
        args,
        settings={"networks": networks, "data": data, "training": args},
    )
    return headline | {"artifact": str(save_stage1(loaded[0], args.output_dir)) if args.should_save else None}


if __name__ == "__main__":
    run_command(main)
