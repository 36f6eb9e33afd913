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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from engine.command.arguments import parse_arguments
from engine.command.run import describe_device, local_device, open_run, run_command
from engine.command.settings import setting
from engine.data.masked_questions import load_masked_questions
from engine.data.starter.masked_questions import build_lesions
from engine.errors import InputError, input_errors
from engine.evaluation.judge import Judge
from engine.evaluation.masks import (
    LEGEND,
    ask_judge,
    evaluate_segmentation,
    format_table,
    newest_checkpoint,
    segmentation_samples,
    write_segmentation_evaluation,
)
from engine.report.report import write_report
from models.prs_med.model import load_prs_med

logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments:
    """What is asked of which model."""

    model: str | None = setting(None, "Checkpoint folder. None: the newest one of recipes.prs_med_train.")
    vlm_path: str | None = setting(None, "Where the VLM is, if not where the checkpoint says.")
    data_root: str | None = setting(None, "Folder of the sets. None: the starter data.")
    ann_paths: str | None = setting(None, "Annotation CSVs, comma-separated. None: all of DATA_ROOT/annotations.")
    split: str = setting("test", "Which rows.", choices=["train", "val", "test"])
    limit: int | None = setting(None, "Only the first so many rows.")
    on_bad_row: str = setting("error", "A bad row ends the run, or is skipped, counted and listed.", choices=["error", "skip"])
    compat: str = setting(
        "default",
        "Infer well, or as the published code: no adapters, its prompt, stretched masks.",
        choices=["default", "reference"],
    )
    batch_size: int = setting(8, "Rows answered at once.")
    max_new_tokens: int = setting(64, "Longest answer in tokens.")
    judge_url: str | None = setting(None, "OpenAI-compatible server of the judge, e.g. http://localhost:8000/v1. None: no judge.")
    judge_model: str | None = setting(None, "The judge's name there.")
    save_masks: bool = setting(False, "Write the predicted masks.")
    output_dir: str | None = setting(None, "Run folder. None: runs/prs_med_eval/<time>.")

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")
        if (self.judge_url is None) != (self.judge_model is None):
            raise InputError("--judge_url and --judge_model belong together")


def main(argv: list[str]) -> dict | None:
    (args,) = parse_arguments(EvaluationArguments, argv, recipe="prs_med_eval", description=__doc__)
    judge = None if args.judge_url is None else Judge(args.judge_url, args.judge_model)
    data_root = args.data_root or build_lesions()
    rows = load_masked_questions(data_root, args.ann_paths, split=args.split, on_bad_row=args.on_bad_row, limit=args.limit)
    for line in rows.skipped:
        logger.warning("skipped: %s", line)
    device = local_device()
    checkpoint = args.model or newest_checkpoint("prs_med_train", "prs_med.json")
    with input_errors("--model"):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = load_prs_med(checkpoint, vlm=args.vlm_path, dtype=dtype, compat=args.compat)
    model.to(device)
    run = open_run("prs_med_eval", args.output_dir)
    run.write_json("config.json", asdict(args) | {"model": str(checkpoint), "data_root": str(data_root)})
    logger.info("PRS-Med evaluation of %s: %d rows, on %s, output in %s", checkpoint, len(rows), describe_device(), run.path)

    segment = partial(model.segment_batch, max_new_tokens=args.max_new_tokens)
    keep = partial(save_mask, run.path / "masks") if args.save_masks else None
    evaluation = evaluate_segmentation(
        segment, rows, batch_size=args.batch_size, compat=args.compat, keep_mask=keep, progress=run.writes
    )
    if not run.writes:
        return None
    write_segmentation_evaluation(run.path, evaluation)  # before the judge, whose server may fail
    if judge is not None:
        ask_judge(evaluation, judge)
        write_segmentation_evaluation(run.path, evaluation)
    logger.info("in percent:\n%s", format_table(evaluation))
    headline = evaluation.headline() | {"output": str(run.path)}
    write_report(
        run.path / "report.html",
        title="PRS-Med evaluation",
        headline=headline,
        settings=asdict(args),
        rows=[],
        samples=segmentation_samples(evaluation, rows, segment),
        measures=evaluation.shown(),
        legend=LEGEND,
        skipped=rows.skipped,
    )
    return headline


def save_mask(folder: Path, row: dict, levels) -> None:
    name = re.sub(r"[^\w().-]", "_", f"{row['row']:05d}_{Path(row['image_id']).stem}")
    path = folder / re.sub(r"[^\w().-]", "_", row["dataset"]) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)


if __name__ == "__main__":
    run_command(main)
