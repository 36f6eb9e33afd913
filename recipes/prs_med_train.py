"""PRS-Med: a vision-language model and a mask decoder learn to say and to show where a lesion is (arXiv:2505.11872).

    python -m recipes.prs_med_train
    torchrun --nproc_per_node=2 -m recipes.prs_med_train --output_dir OUT --data_root data/prs-med-dataset \\
        --ann_paths annotations/brain_tumors_ct_scan.csv,annotations/polyp_endoscopy.csv \\
        --vlm_path microsoft/llava-med-v1.5-mistral-7b --sam_ckpt tinysam_42.3.pth --batch_size 8 --epochs 20

With no flags: a small LLaVA, built on the spot and taught to speak and to see (`engine.training.warm_up.masked`), and a small
encoder learn from lesions drawn on real images. The last line is JSON: dice_before and dice_after (held-out rows, mean of the
images' Dice at 0.5), place_accuracy_before and _after, majority_accuracy, seconds, checkpoint (for `recipes.prs_med_infer`).
What trains: LoRA on the language model's attention, the image encoder, the mask decoder, the class head.

Measured without flags, in 120 steps: Dice from 0.10 to 0.90, right places from 14 % to 78 % (83 and 87 % with seeds 1, 2; the best
constant answer: 24 %). The warm-up taught the small model to find lesions in mirrored pictures: training adds left and right.

Differences from the published code, which `--compat reference` takes back: the mask decoder sees the states of the question alone
in training too (not the answer it is to find) and none of padding; the structure loss weights edges in its cross entropy as well;
the text loss counts the answer and its end, not the question; training and inference have one prompt; adapters are float32 and on
the language model alone; masks are binary; texts are not cut; TinySAM's BatchNorm keeps its statistics; the cosine of the learning
rate ends with the run and not after 20 epochs. (What the published inference loses, `recipes.prs_med_eval` can lose as well.)
Always: one pass of the VLM a step (not two), `val` rows stay out of training, seeds are set, adapters are loaded back at inference,
the vision tower is the checkpoint's own (`--vision_tower openai` is what the published code loads).
"""

from dataclasses import dataclass
from functools import partial

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import setting
from engine.data.masks.chosen import HELP
from engine.errors import InputError, input_errors
from engine.training.config.masks import REFUSED, MaskConfig

# What the run without flags uses instead of the published settings: its networks are small and start from nothing.
STARTER = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "max_steps": 120,
    "save_strategy": "steps",
    "save_steps": 60,
}


@dataclass
class PRSMedArguments:
    """Which model learns from which rows."""

    data_root: str | None = setting(None, "Folder of the sets. None: the starter data.", aliases=["--data_path"])
    ann_paths: str | None = setting(None, "CSVs or folders, with commas. None: all annotations.", aliases=["--annotation_path"])
    vlm_path: str | None = setting(None, "LLaVA-Med or LLaVA, folder or hub name. None: a small one.", aliases=["--model_path"])
    sam_ckpt: str | None = setting(None, "TinySAM's checkpoint (tinysam_42.3.pth), needed with --vlm_path.")
    vision_tower: str = setting("checkpoint", "The checkpoint's vision tower, or OpenAI's.", choices=["checkpoint", "openai"])
    decoder: str = setting("v5", "Published mask decoder 5 or 6, or that of the paper's text.", choices=["v5", "v6", "paper"])
    lora_r: int = setting(16, "LoRA rank.", at_least=1, at_most=4096, aliases=["--lora_rank"])
    lora_alpha: int = setting(16, "LoRA scale: updates are multiplied by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = setting(0.05, "Dropout on the input of the adapters.", at_least=0, less_than=1)
    eval_split: str = setting("test", "Rows to evaluate on before and after training.", choices=["test", "val"])
    eval_limit: int = setting(200, "Evaluate on at most so many of them, evenly spread; 0: do not evaluate.", at_least=0)
    on_bad_row: str = setting("error", "A bad row ends the run, or is skipped, counted and listed.", choices=["error", "skip"])
    mask_values: str | None = setting(None, HELP, metavar="VALUES")
    warm_up_steps: int = setting(450, "Steps that teach the small LLaVA to speak and to see.", at_least=0)
    compat: str = setting(
        "default", "Train well, or with the quirks of the published code (see above).", choices=["default", "reference"]
    )

    def __post_init__(self):
        if (self.vlm_path is None) != (self.sam_ckpt is None):
            raise InputError("--vlm_path and --sam_ckpt belong together: the small model brings its own encoder")


def main(argv: list[str]) -> dict:
    kinds, of_users = (PRSMedArguments, MaskConfig), ("data_root", "vlm_path")
    task, args = parse_arguments(
        kinds, argv, recipe="prs_med_train", description=__doc__, starter=STARTER, starter_unless=of_users, refused=REFUSED
    )
    if task.compat == "reference":
        args.follow_cosine(args.cosine_epochs or 20)
        args.mask_loss = "published_structure" if args.mask_loss == "structure" else args.mask_loss
    # Imported once the flags are known to be good, since these take seconds.
    from engine.runs.train import train
    from engine.tasks.masks import MaskTask
    from engine.training.masks import MaskTrainer

    splits = load_splits(task)
    return train(
        "prs_med_train",
        "PRS-Med training",
        MaskTrainer,
        lambda: load_model(task, args, splits.train),
        MaskTask(),
        splits,
        args,
        settings={"task": task, "training": args},
    )


def load_splits(task: PRSMedArguments):
    """Training rows, and at most eval_limit of the held-out ones."""
    from engine.data.masked_questions import load_masked_questions
    from engine.data.rows import evenly_spread
    from engine.data.splits import Splits
    from engine.data.starter.masked_questions import build_lesions

    root = task.data_root or build_lesions()
    load = partial(load_masked_questions, root, task.ann_paths, on_bad_row=task.on_bad_row, mask_values=task.mask_values)
    train = load(split="train")
    test = load(split=task.eval_split) if task.eval_limit else None
    return Splits(train, test and test.select(evenly_spread(len(test), task.eval_limit)))


def load_model(task: PRSMedArguments, args: MaskConfig, rows):
    """The pretrained model that the flags name, or the small one, warmed up on `rows` (that of the checkpoint, where a run is
    resumed); with new adapters."""
    import torch

    from engine.device import one_thread_if_small
    from engine.training.warm_up.masked import warm_up
    from models.llava.llava_med import load_llava
    from models.prs_med.model import PRSMed, PRSMedConfig, build_prs_med
    from models.prs_med.processor import PROMPT
    from models.starter.llava import build_tiny_llava

    if task.vlm_path is not None:
        config = PRSMedConfig(vision_tower=task.vision_tower, decoder=task.decoder, compat=task.compat)
        with input_errors("--vlm_path, --sam_ckpt"):
            model = build_prs_med(task.vlm_path, task.sam_ckpt, config, torch.bfloat16 if args.bf16 else torch.float32)
    else:
        one_thread_if_small(task.data_root is None, args.device)
        if resume := args.resume_from_checkpoint:
            with input_errors("--resume_from_checkpoint"):
                vlm, tokenizer = load_llava(f"{resume}/vlm")
        else:
            texts = [f"{PROMPT.format(question=row['question'])}{row['answer']}" for row in rows.records]
            vlm, tokenizer = build_tiny_llava(texts, seed=args.seed)
        model = PRSMed(vlm, tokenizer, PRSMedConfig(image_encoder="starter", decoder=task.decoder, compat=task.compat))
        if task.warm_up_steps and not resume:
            warm_up(vlm, model.processor.collate, rows, steps=task.warm_up_steps, learning_rate=2e-3, seed=args.seed)
    torch.manual_seed(args.seed)
    frozen_norms = task.sam_ckpt is not None and task.compat == "default"
    return model.prepare_training(r=task.lora_r, alpha=task.lora_alpha, dropout=task.lora_dropout, frozen_norms=frozen_norms)


if __name__ == "__main__":
    run_command(main)
