"""Uni-MedVLM, stage 4: the FFNs of stages 2 and 3 become experts, and routers learn which token goes to which.

    python -m recipes.unimed_stage4_router
    torchrun --nproc_per_node=8 -m recipes.unimed_stage4_router --stage1 OUT1/stage1_projector_cvfm.bin --stage2 OUT2/stage2 \\
        --stage3 OUT3/stage3 --output_dir OUT4 --dataset_name SAMed2Dv1 --model_name_or_path meta-llama/Llama-3.1-8B-Instruct \\
        --vision_tower openai/clip-vit-large-patch14-336 --convnext facebook/convnext-large-384 --sam_ckpt sam-med2d_b.pth \\
        --deepspeed recipes/deepspeed/zero2_offload.json

Expert 0 is the FFN of grounding, expert 1 that of questions; each is frozen and has a LoRA of its own. Routers, these adapters, the
mask decoder, text_hidden_fcs, the region adapter and the rows of the new tokens learn, on questions and masks together. MedPLIB's
settings are the defaults: top-1, 3e-4, three epochs, 4 rows x 8 passes a step; but nothing is dropped (`--capacity_factor 1.5`
drops as DeepSpeed does), and the balance loss counts (`--router_aux_loss_coef 0.01`; MedPLIB's script has 0).

The run folder gets `stage4/`, one checkpoint of all, and usage.png and usage.json: the share of a layer's tokens that each expert
gets, by kind of question. With no flags: the small networks, and what the newest runs of stages 1 to 3 left.

The last line is JSON: accuracy, closed_accuracy, mDice, seg_share and others, each _before and _after, of held-out questions and
masks; loss_first and loss_last, seconds, checkpoint, artifact.
"""

from dataclasses import dataclass, replace

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import DataArguments, setting
from engine.command.unimed_settings import NetworkArguments, left_by
from engine.training.config.grounding import GroundingConfig

PUBLISHED = {
    "learning_rate": 3e-4,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "bce_weight": 2.0,
    "dice_weight": 0.5,
    "save_steps": 500,
}
# What a run without flags uses instead: its networks are small.
STARTER = {
    "learning_rate": 2e-3,
    "dice_weight": 1.0,
    "bce_weight": 1.0,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_completion_length": 32,
    "max_steps": 140,
    "save_steps": 70,
    "save_total_limit": 2,
}


@dataclass
class Stage4Arguments(NetworkArguments):
    """What is trained, and from where."""

    stage1: str | None = setting(None, "What stage 1 left. None: that of its newest run.", metavar="FILE")
    stage2: str | None = setting(None, "What stage 2 left. None: that of its newest run.", metavar="DIR")
    stage3: str | None = setting(None, "What stage 3 left. None: that of its newest run.", metavar="DIR")
    top_k: int = setting(1, "Experts a token goes to.", at_least=1, at_most=2)
    capacity_factor: float | None = setting(
        None, "An expert takes at most this times its even share of tokens in training. None: all that come.", more_than=0
    )
    renormalize: bool = setting(False, "Weights of a token's experts have the sum 1; of one expert alone no router learns then.")
    router_aux_loss_coef: float = setting(0.01, "Weight of the balance of experts.", at_least=0)
    router_z_loss_coef: float = setting(0.0, "Weight of the routers' z-loss.", at_least=0)
    lora_r: int = setting(8, "LoRA rank of an expert.", at_least=1, at_most=4096)
    lora_alpha: int = setting(16, "LoRA scale: updates are multiplied by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = setting(0.05, "Dropout on the input of the adapters.", at_least=0, less_than=1)


def main(argv: list[str]) -> dict:
    kinds, shared = (Stage4Arguments, DataArguments, GroundingConfig), {"defaults": PUBLISHED, "starter": STARTER}
    own, data, args = parse_arguments(kinds, argv, recipe="unimed_stage4_router", description=__doc__, **shared)
    sources = left_by(1, own.stage1), left_by(2, own.stage2), left_by(3, own.stage3)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.mecovqa.splits import load_mecovqa_splits
    from engine.runs.expert_usage import write_usage
    from engine.runs.train import train
    from engine.tasks.mecovqa.task import MeCoVQATask
    from engine.training.grounding import GroundingTrainer

    splits, task, loaded = load_mecovqa_splits(data), MeCoVQATask(), []

    def load():
        loaded.append(load_model(own, args, *sources))
        return loaded[0]

    headline = train(
        "unimed_stage4_router",
        "Uni-MedVLM, stage 4: routing",
        GroundingTrainer,
        load,
        task,
        splits,
        args,
        settings={"networks": own, "data": data, "training": args},
    )
    if not args.should_save:
        return headline
    policy, folder = loaded[0], f"{args.output_dir}/stage4"
    policy.model.save_pretrained(folder)
    if splits.test is not None:
        write_usage(policy, policy.model.ledger, task, splits.test, args.output_dir)
    return headline | {"artifact": folder}


def load_model(own: Stage4Arguments, args: GroundingConfig, stage1, stage2, stage3):
    """The policy with experts from what the stages have left, ready to be trained."""
    from engine.errors import input_errors
    from engine.training.warm_up.unimed import small_networks
    from models.starter.uni_medvlm import build_tiny_unimed
    from models.uni_medvlm.checkpoints.loading import load_pretrained
    from models.uni_medvlm.checkpoints.networks import build_unimed
    from models.uni_medvlm.experts import ExpertLoRA, RoutingOptions
    from models.uni_medvlm.stages.artifacts import load_stage1
    from models.uni_medvlm.stages.merged_experts import build_experts
    from models.uni_medvlm.stages.trainable import prepare_stage

    policy = own.load(build_unimed, load_pretrained, lambda: small_networks(build_tiny_unimed), args)
    model = policy.model
    options = RoutingOptions(own.top_k, own.capacity_factor, renormalize=own.renormalize)
    with input_errors("--stage1, --stage2, --stage3"):
        load_stage1(model, stage1)
        build_experts(model, stage2, stage3, options, lora=ExpertLoRA(own.lora_r, own.lora_alpha, own.lora_dropout))
    model.settings = replace(model.settings, balance=own.router_aux_loss_coef, z=own.router_z_loss_coef)
    prepare_stage(model, 4)
    return policy


if __name__ == "__main__":
    run_command(main)
