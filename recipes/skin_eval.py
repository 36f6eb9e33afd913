"""Skin diagnosis, evaluation: diagnoses, regions and boxes of lesions, with a confusion matrix and boxes drawn (HAM10000).

    python -m recipes.skin_eval
    python -m recipes.skin_eval --model runs/skin_grpo/20261122-171455/checkpoint-120 --data data/skin
    python -m recipes.skin_eval --model CHECKPOINT --data data/skin --iou mask --sam_model sam_vit_b --sam_ckpt medsam_vit_b.pth

With no flags: the starter policy for skin lesions, before stage 1, on the 124 starter test lesions; about 15 s on one CPU thread.
Answers are greedy. With `--iou mask` the predicted box is given to a model of the SAM family, whose mask is compared with the
lesion's.

The run folder gets evaluation.json (scores and every row), confusion.png and report.html, with boxes drawn over images. The last
line is JSON, of fractions: diagnosis_accuracy, balanced_accuracy, region_accuracy (exact match), mean_iou, iou_over_50 (boxes that
overlap by more than a half), num_samples, unanswered, output; recall of each diagnosis; low and high, the ends of 95 % intervals.
`--question tagged` asks as the published variant on the hub's data does: its location is the body part.

The published code asks 10 or 50 lesions, draws answers at a temperature of 0.7, and counts those that raise no error as passed.
"""

from dataclasses import dataclass
from functools import partial

from engine.command.arguments import parse_arguments
from engine.command.evaluation_settings import PolicyArguments
from engine.command.lesion_settings import OverlapArguments
from engine.command.main import run_command
from engine.command.settings import setting
from engine.data.lesions import QUESTIONS


@dataclass
class EvaluationArguments(OverlapArguments, PolicyArguments):
    """What is asked of which model."""

    question: str = setting(
        "box",
        "diagnosis; location: and the region; box: and the bounding box too; tagged: diagnosis, body part and box in tags.",
        choices=list(QUESTIONS),
    )
    max_new_tokens: int = setting(128, "Longest answer in tokens.", at_least=1, at_most=2**17)

    def __post_init__(self):
        OverlapArguments.__post_init__(self)
        PolicyArguments.__post_init__(self)


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(EvaluationArguments, argv, recipe="skin_eval", description=__doc__)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.lesions import load_skin
    from engine.data.splits import readable_prompts
    from engine.data.starter.lesions import build_starter_skin
    from engine.rollout.answers import GreedyAnswers
    from engine.runs.evaluate import run_evaluation, start_evaluation
    from engine.tasks.skin.task import LesionTask
    from models.loading import SKIN_STARTER_POLICY, load_policy
    from models.sam.loading import load_predictor

    title = "Skin diagnosis, evaluation"
    lesions = load_skin(
        args.data or [build_starter_skin()],
        question=args.question,
        image_root=args.image_root,
        split=args.split,
        on_bad_row=args.on_bad_row,
        limit=args.limit,
    )
    task = LesionTask.of(args.segmenter(load_predictor))
    policy = args.load(partial(load_policy, starter=SKIN_STARTER_POLICY))
    lesions = readable_prompts(lesions, task.prompt, policy.processor, args.on_bad_row)
    run = start_evaluation("skin_eval", title, lesions, args)
    answers = GreedyAnswers(policy, task.prompt, args.max_new_tokens)
    return run_evaluation(run, title, answers, task, lesions, args, of=args.model or "the starter policy")


if __name__ == "__main__":
    run_command(main)
