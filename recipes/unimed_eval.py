"""Uni-MedVLM, evaluation: MeCoVQA's questions about images and regions, and its masks.

    python -m recipes.unimed_eval
    python -m recipes.unimed_eval --model OUT4/stage4 --data SAMed2Dv1/test/MeCoVQA_Grounding_test.json --image_root SAMed2Dv1

`--model`: a whole checkpoint, of stage 4 or 5, or a checkpoint-N of any stage; by default what the newest run of stage 5, or else
of stage 4, has left. Answers are greedy, and a mask is drawn for each `<SEG>` among them. `--reasoned` asks as stage 5 does.

The run folder gets evaluation.json (scores and every row), table.csv and report.html with masks drawn over images. The last line is
JSON: accuracy (words exact, masks with an IoU over 0.5), closed_accuracy, open_exact, open_recall, open_precision, open_f1, bleu,
rouge1, rougeL, mDice, mIoU, seg_share, num_samples, output, and the ends of 95 % intervals, low and high; what has no rows is left
out. `--compat reference` scores as MedPLIB's evaluation does: the first mask alone, probabilities above 0.1, two empty masks 0.
"""

from dataclasses import dataclass

from engine.command.arguments import parse_arguments
from engine.command.evaluation_settings import EvaluationSettings
from engine.command.main import run_command
from engine.command.settings import setting
from engine.command.unimed_settings import newest_whole
from engine.errors import input_errors


@dataclass
class EvaluationArguments(EvaluationSettings):
    """What is asked of which model."""

    model: str | None = setting(None, "Checkpoint folder. None: that of the newest run of stage 5, or else of 4.")
    data: list[str] | None = setting(None, "Files or folders of MeCoVQA. None: the starter test rows.")
    image_root: str | None = setting(None, "Folder of images/ and masks/. None: that of the file or the one above.", metavar="DIR")
    split: str = setting("test", "Split of a folder that holds several.")
    reasoned: bool = setting(False, "Ask for a thought first, as stage 5 does.")
    compat: str = setting("default", "Score well, or as MedPLIB does.", choices=["default", "reference"])
    max_new_tokens: int = setting(128, "Longest answer in tokens.", at_least=1, at_most=2**17)


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(EvaluationArguments, argv, recipe="unimed_eval", description=__doc__)
    checkpoint = args.model or newest_whole()

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.mecovqa.rows import load_mecovqa
    from engine.data.splits import readable_prompts
    from engine.data.starter.unimed import build_starter_unimed
    from engine.device import inference_dtype, local_device, one_thread_if_small
    from engine.rollout.grounded import GroundedAnswers
    from engine.runs.evaluate import run_evaluation, start_evaluation
    from engine.tasks.mecovqa.reasoning import ReasoningTask
    from engine.tasks.mecovqa.task import MeCoVQATask
    from models.uni_medvlm.checkpoints.loading import load_pretrained

    title, task = "Uni-MedVLM, evaluation", (ReasoningTask if args.reasoned else MeCoVQATask)(args.compat)
    source, device = args.data or [build_starter_unimed()], local_device()
    rows = load_mecovqa(source, image_root=args.image_root, split=args.split, on_bad_row=args.on_bad_row, limit=args.limit)
    with input_errors("--model"):
        policy = load_pretrained(checkpoint, dtype=inference_dtype(device))
    one_thread_if_small(policy.model.origin.llm is None, device)
    policy.model.to(device).eval().requires_grad_(False)
    rows = readable_prompts(rows, task.prompt, policy.processor, args.on_bad_row)
    run = start_evaluation("unimed_eval", title, rows, args, model=str(checkpoint))
    answers = GroundedAnswers(policy, task.prompt, args.max_new_tokens)
    return run_evaluation(run, title, answers, task, rows, args, of=str(checkpoint))


if __name__ == "__main__":
    run_command(main)
