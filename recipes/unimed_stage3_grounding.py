"""Uni-MedVLM, stage 3: asked for a structure, the model says `<SEG>`, and the mask decoder draws it (SAM-Med2D at 256 pixels).

    python -m recipes.unimed_stage3_grounding
    python -m recipes.unimed_stage3_grounding --simulate_one_step
    torchrun --nproc_per_node=8 -m recipes.unimed_stage3_grounding --stage1 OUT1/stage1_projector_cvfm.bin --output_dir OUT3 \\
        --dataset_name data/grounding/train/MeCoVQA-Grounding.json --model_name_or_path meta-llama/Llama-3.1-8B-Instruct \\
        --vision_tower openai/clip-vit-large-patch14-336 --convnext facebook/convnext-large-384 --sam_ckpt sam-med2d_b.pth \\
        --deepspeed recipes/deepspeed/zero2_offload.json

The mask decoder and text_hidden_fcs learn, LoRA on the language model's FFNs, and the rows of the new tokens in its embedding and
head. The run folder gets `stage3/`: stage3_grounding_weights.bin and a PEFT folder. It starts from stage 1 (`--stage1`, by default
of its newest run), as published; with `--stage2` that stage's adapter is merged first, as MedPLIB does it, so that stage 4's
experts share the attention that both were trained with. The loss is text + cross entropy + Dice; the published settings are the
defaults: 5e-5, three epochs, 1 row x 16 passes a step. MedPLIB's weights: `--dice_weight 5 --focal_weight 1`.

`--simulate_one_step` takes one real step, shows the losses of text and masks, and checks that they are finite and positive, that
gradients reach what is trained and nothing else, and that it changed. `--check_model` builds the networks and counts what is
trained.

The last line is JSON: mDice, mIoU and seg_share (answers with `<SEG>`), each _before and _after, of held-out questions; the Dice of
full and empty masks; loss_first and loss_last, seconds, checkpoint, artifact.

Differences from the published code (https://github.com/AmberGTP5/MedPLIB_FILA), whose stage 3 cannot start: the model learns to say
`<SEG>`; a mask is drawn from the state that predicts it; images of 256 pixels, as SAM-Med2D was trained, padded around the middle,
and the padding is cut off the mask again; what was trained is saved.
"""

from dataclasses import dataclass
from tempfile import TemporaryDirectory

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import DataArguments, refuse, setting
from engine.command.unimed_settings import NetworkArguments, left_by
from engine.training.config.grounding import GroundingConfig

PUBLISHED = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "save_steps": 500,
}
# What a run without flags uses instead: its networks are small, and its mask decoder starts from nothing.
STARTER = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_completion_length": 16,
    "max_steps": 120,
    "save_steps": 60,
    "save_total_limit": 2,
}
ONE_STEP = {"max_steps": 1, "save_strategy": "no", "logging_steps": 1}


@dataclass
class Stage3Arguments(NetworkArguments):
    """What is trained, and from where."""

    stage1: str | None = setting(None, "What stage 1 left. None: that of its newest run.", metavar="FILE")
    stage2: str | None = setting(None, "What stage 2 left, to be merged first. None: start from stage 1 alone.", metavar="DIR")
    lora_r: int = setting(8, "LoRA rank.", at_least=1, at_most=4096)
    lora_alpha: int = setting(16, "LoRA scale: updates are multiplied by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = setting(0.05, "Dropout on the input of the adapters.", at_least=0, less_than=1)
    simulate_one_step: bool = setting(False, "Take one step and check it; nothing is saved.")
    check_model: bool = setting(False, "Build the networks and count what is trained; nothing is trained.")

    def __post_init__(self):
        super().__post_init__()
        refuse([(not (self.simulate_one_step and self.check_model), "--simulate_one_step takes a step, --check_model takes none")])


def main(argv: list[str]) -> dict:
    kinds, shared = (Stage3Arguments, DataArguments, GroundingConfig), {"defaults": PUBLISHED, "starter": STARTER}
    own, data, args = parse_arguments(kinds, argv, recipe="unimed_stage3_grounding", description=__doc__, **shared)
    sources = left_by(1, own.stage1), own.stage2 and left_by(2, own.stage2)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.mecovqa.splits import load_mecovqa_splits
    from engine.runs.simulate import simulate_step
    from engine.runs.train import train
    from engine.tasks.mecovqa.task import MeCoVQATask
    from engine.training.grounding import GroundingTrainer
    from models.uni_medvlm.stages.artifacts import save_stage3
    from models.uni_medvlm.stages.trainable import trained_by_part

    if own.check_model:
        return trained_by_part(load_model(own, args, *sources).model)
    splits, task = load_mecovqa_splits(data, ["grounding"]), MeCoVQATask()
    if own.simulate_one_step:
        with TemporaryDirectory() as folder:  # a Trainer makes its folder, though nothing is saved
            for name, value in {**ONE_STEP, "output_dir": folder}.items():
                setattr(args, name, value)
            policy = load_model(own, args, *sources)
            return simulate_step(GroundingTrainer(policy, task, args, splits.train), ["loss/lm", "loss/bce", "loss/dice"])
    loaded = []

    def load():
        loaded.append(load_model(own, args, *sources))
        return loaded[0]

    headline = train(
        "unimed_stage3_grounding",
        "Uni-MedVLM, stage 3: grounding",
        GroundingTrainer,
        load,
        task,
        splits,
        args,
        settings={"networks": own, "data": data, "training": args},
    )
    folder = f"{args.output_dir}/stage3"
    return headline | {"artifact": str(save_stage3(loaded[0].model, folder)) if args.should_save else None}


def load_model(own: Stage3Arguments, args: GroundingConfig, stage1, stage2):
    """The policy as stage 1, or stages 1 and 2, have left it, ready to be trained."""
    from engine.errors import input_errors
    from engine.training.warm_up.unimed import small_networks
    from models.starter.uni_medvlm import build_tiny_unimed
    from models.uni_medvlm.checkpoints.loading import load_pretrained
    from models.uni_medvlm.checkpoints.networks import build_unimed
    from models.uni_medvlm.experts import ExpertLoRA
    from models.uni_medvlm.stages.artifacts import load_stage1, load_stage2
    from models.uni_medvlm.stages.trainable import prepare_stage

    policy = own.load(build_unimed, load_pretrained, lambda: small_networks(build_tiny_unimed), args)
    with input_errors("--stage1, --stage2"):
        load_stage1(policy.model, stage1)
        if stage2:
            load_stage2(policy.model, stage2)
    prepare_stage(policy.model, 3, ExpertLoRA(own.lora_r, own.lora_alpha, own.lora_dropout))
    return policy


if __name__ == "__main__":
    run_command(main)
