"""PRS-Med, evaluation: masks and positions per data set (arXiv:2505.11872, section 4).

    python -m recipes.prs_med_eval
    python -m recipes.prs_med_eval --model CHECKPOINT --data_root data/prs-med-dataset --ann_paths annotations/lung_CT.csv \\
        --judge_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-8B

With no flags: the newest checkpoint of `recipes.prs_med_train` on the starter test rows. Masks: mDice and mIoU over the 256
thresholds of the published evaluation, Dice and IoU at 0.5, S-measure, E-measure, weighted F, MAE. Positions: how many answers name
the place of the `position` column, read by fixed rules, beside the best constant answer (on skin that alone has 93 %); with
`--judge_url` also by a language model behind an OpenAI-compatible server, with the three published prompts (key in OPENAI_API_KEY).

The run folder gets evaluation.json (table and every row), table.csv (a line a data set), report.html with masks drawn, and with
`--save_masks` masks/<set>/<row>_<image>.png. The last line is JSON, of all rows together: num_samples, mDice, mIoU, dice, iou,
s_measure, e_measure, weighted_f, mae, place_accuracy, majority_accuracy, unread, judge_accuracy, judge_std (fractions), output.

Differences from the published scripts: predictions and truths are joined by row and not by sorted order; answers are greedy, as is
the judge; and, which `--compat reference` takes back as the published numbers need it, the trained adapters are applied, the prompt
is that of training, and masks are not stretched to their full range image by image, which turns an empty mask into a full one.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.command.arguments import parse_arguments
from engine.command.evaluation_settings import EvaluationSettings
from engine.command.main import run_command
from engine.command.run_folder import newest_output
from engine.command.settings import refuse, setting
from engine.data.masks.chosen import HELP
from engine.errors import input_errors

logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments(EvaluationSettings):
    """What is asked of which model."""

    model: str | None = setting(None, "Checkpoint folder. None: the newest one of recipes.prs_med_train.", aliases=["--checkpoint"])
    vlm_path: str | None = setting(None, "Where the VLM is, if not where the checkpoint says.")
    data_root: str | None = setting(None, "Folder of the sets. None: the starter data.")
    ann_paths: str | None = setting(None, "Annotation CSVs, comma-separated. None: all of DATA_ROOT/annotations.")
    split: str = setting("test", "Which rows.", choices=["train", "val", "test"])
    compat: str = setting(
        "default",
        "Infer well, or as the published code: no adapters, its prompt, stretched masks.",
        choices=["default", "reference"],
    )
    batch_size: int = setting(8, "Rows answered at once.", at_least=1)
    max_new_tokens: int = setting(64, "Longest answer in tokens.", at_least=1, at_most=2**17)
    judge_url: str | None = setting(None, "OpenAI-compatible server of the judge, e.g. http://localhost:8000/v1. None: no judge.")
    judge_model: str | None = setting(None, "The judge's name there.")
    mask_values: str | None = setting(None, HELP, metavar="VALUES")
    save_masks: bool = setting(False, "Write the predicted masks.")

    def __post_init__(self):
        super().__post_init__()
        refuse([((self.judge_url is None) == (self.judge_model is None), "--judge_url and --judge_model belong together")])


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(EvaluationArguments, argv, recipe="prs_med_eval", description=__doc__)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.data.masked_questions import load_masked_questions
    from engine.data.starter.masked_questions import build_lesions
    from engine.device import inference_dtype, local_device
    from engine.evaluation.judge import Judge
    from engine.runs.evaluate import run_evaluation, start_evaluation
    from engine.tasks.evaluation import Evaluation
    from engine.tasks.masks import MaskAnswers, MaskTask, format_table
    from models.prs_med.model import load_prs_med

    title, task = "PRS-Med evaluation", MaskTask(args.compat)
    judge = None if args.judge_url is None else Judge(args.judge_url, args.judge_model)
    data_root = args.data_root or build_lesions()
    chosen = {"split": args.split, "on_bad_row": args.on_bad_row, "limit": args.limit, "mask_values": args.mask_values}
    rows = load_masked_questions(data_root, args.ann_paths, **chosen)
    device, checkpoint = local_device(), args.model or newest_output("prs_med_train", "prs_med.json")
    with input_errors("--model"):
        model = load_prs_med(checkpoint, vlm=args.vlm_path, dtype=inference_dtype(device), compat=args.compat).to(device)
    run = start_evaluation("prs_med_eval", title, rows, args, model=str(checkpoint), data_root=str(data_root))

    segment = partial(model.segment_batch, max_new_tokens=args.max_new_tokens)
    answers = MaskAnswers(segment, stretched=args.compat == "reference")
    asked = keeping_masks(answers, run.path / "masks") if args.save_masks else answers

    def judged(evaluation: Evaluation) -> Evaluation:
        evaluation = evaluation if judge is None else task.judged(evaluation, judge)
        logger.info("in percent:\n%s", format_table(evaluation))
        return evaluation

    return run_evaluation(run, title, asked, task, rows, args, of=str(checkpoint), revise=judged)


def keeping_masks(answers: Callable, folder: Path) -> Callable:
    """The same answers; their masks are written as <set>/<row>_<image>.png."""
    from PIL import Image

    from engine.report.overlay import write_png

    def answer(rows: list[dict]) -> list:
        found = answers(rows)
        for row, answer in zip(rows, found, strict=True):
            name = re.sub(r"[^\w().-]", "_", f"{row['row']:05d}_{Path(row['image_id']).stem}")
            write_png(folder / re.sub(r"[^\w().-]", "_", row["dataset"]) / f"{name}.png", Image.fromarray(answer.levels))
        return found

    return answer


if __name__ == "__main__":
    run_command(main)
