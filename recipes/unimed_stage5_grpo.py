"""Uni-MedVLM, stage 5: GRPO on the model with experts, with MedVLM-R1's rewards and the IoU of the masks it draws.

    python -m recipes.unimed_stage5_grpo
    torchrun --nproc_per_node=8 -m recipes.unimed_stage5_grpo --stage4 OUT4/stage4 --output_dir OUT5 --dataset_name SAMed2Dv1 \\
        --deepspeed recipes/deepspeed/zero2_offload.json

A question in words is asked with an instruction to think first: a right answer in its tags earns 1, the form another 1 (closed
questions; an open one earns the F1 of its words). Asked for a mask, the model earns the IoU of what it draws with the truth. The
experts' adapters and new ones on the attention learn; routers and heads stay. A model that has lost the form in earlier stages
gets no reward for it, and finds it again by `--cold_start_steps`: supervised, with answers that are careless. `--stage4`: by
default what the newest run of `recipes.unimed_stage4_router` left. The settings are MedVLM-R1's: 4 answers, 1 question x 2 passes a
step, two epochs.

The run folder gets `stage5/`, one checkpoint of all. With no flags: the small networks, and of the starter data the masks and the
closed questions about images and regions. The last line is JSON: reward, accuracy, closed_accuracy, mDice and others, each _before
(after the cold start) and _after, of held-out questions; reward_first and reward_last, seconds, checkpoint, artifact.

A mask follows from the tokens before it, so that answers with equal tokens earn equal IoUs: a group of them teaches nothing, and a
model that always says `<SEG>` learns from questions in words alone. `--dynamic_sampling` puts others in such a group's place.

The authors stopped before this stage; what it is follows from MedVLM-R1 (arXiv:2502.19634).
"""

from dataclasses import dataclass

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import DataArguments, setting
from engine.command.unimed_settings import left_by
from engine.training.config.grpo import STARTER, GRPOConfig

PUBLISHED = {"num_generations": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
# Without flags. So small a language model is never sure of a token, and sampled as it is would seldom end an answer in form. Asked
# for a mask it says the same eight times, which teaches nothing: other questions take the place of many of these.
SMALL = STARTER | {"max_steps": 50, "save_steps": 25, "learning_rate": 1e-3, "temperature": 0.5, "cold_start_steps": 40}
SMALL |= {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 1}


@dataclass
class Stage5Arguments:
    """What is trained, and from where."""

    stage4: str | None = setting(None, "What stage 4 left. None: that of its newest run.", metavar="DIR")
    lora_r: int = setting(8, "LoRA rank on the attention.", at_least=1, at_most=4096)
    lora_alpha: int = setting(16, "LoRA scale: updates are multiplied by lora_alpha / lora_r.", at_least=1)
    cold_start_steps: int = setting(0, "Supervised steps of 16 on the form of answers, right or wrong, before GRPO.", at_least=0)


def main(argv: list[str]) -> dict:
    kinds, shared = (Stage5Arguments, DataArguments, GRPOConfig), {"defaults": PUBLISHED, "starter": SMALL}
    own, data, args = parse_arguments(kinds, argv, recipe="unimed_stage5_grpo", description=__doc__, **shared)
    stage4 = left_by(4, own.stage4)

    # Imported once the flags are known to be good, since these take seconds.
    import numpy as np
    import torch

    from engine.data.mecovqa.splits import load_reasoning_splits
    from engine.device import one_thread_if_small
    from engine.errors import input_errors
    from engine.runs.train import train
    from engine.tasks.mecovqa.lessons import FormLessons
    from engine.tasks.mecovqa.mask_reward import mask_reward
    from engine.tasks.mecovqa.reasoning import ReasoningTask, reasoning_rewards
    from engine.training.grpo import GRPOTrainer
    from engine.training.warm_up.lessons import teach
    from models.uni_medvlm.checkpoints.loading import load_pretrained
    from models.uni_medvlm.experts import ExpertLoRA
    from models.uni_medvlm.stages.trainable import prepare_stage

    with input_errors("--stage4"):
        policy = load_pretrained(stage4, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    one_thread_if_small(policy.model.origin.llm is None, args.device)
    torch.manual_seed(args.seed)  # of the new adapters
    prepare_stage(policy.model, 5, ExpertLoRA(own.lora_r, own.lora_alpha, 0.0))
    task, splits = ReasoningTask(rewards=[*reasoning_rewards(), mask_reward(policy)]), load_reasoning_splits(data)
    if own.cold_start_steps:
        rng = np.random.default_rng(args.seed)
        lesson = FormLessons(splits.train, policy.processor.tokenizer.eos_token, rng)
        teach(policy, lesson, own.cold_start_steps, 16, "the form of answers", rate=args.learning_rate)
    headline = train(
        "unimed_stage5_grpo",
        "Uni-MedVLM, stage 5: GRPO",
        GRPOTrainer,
        lambda: policy,
        task,
        splits,
        args,
        settings={"model": own, "data": data, "training": args},
    )
    folder = f"{args.output_dir}/stage5"
    if args.should_save:
        policy.model.save_pretrained(folder)
    return headline | {"artifact": folder}


if __name__ == "__main__":
    run_command(main)
