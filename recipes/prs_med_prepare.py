"""PRS-Med, data: a data root is checked, or images and masks become a set of one (arXiv:2505.11872, section 3).

    python -m recipes.prs_med_prepare --data_root data/prs-med-dataset
    python -m recipes.prs_med_prepare --data_root data --dataset busi --images BUSI --masks BUSI --modality "breast ultrasound"
    python -m recipes.prs_med_prepare --data_root data --dataset mine --modality "head CT slice" --finding tumor

The first form reads every row, image and mask and says what is there and what is missing; its last line is JSON: data_root, sets
(rows per split), missing_sets, united_masks (rows whose mask is in several files), and counts of missing_files and bad_rows
(--report FILE gets the lists). Without flags it checks the starter data. The second form makes DATA/busi and its annotations; the
third only the annotations, of split folders that are there already. Their last line is JSON: train_rows, val_rows, test_rows,
left_out, united_masks, majority (the place a constant answer should name) and its share, annotations. --mask_values says which
values of the masks are lesions, where they do not show it themselves.

Positions follow the published rules: --rule prs-med (bounding box, "center", near within a fifth of the width) or our-dataset
(centroids of the two largest regions, near within 20 pixels). Differences: questions and answers come from our own templates, whose
test part training never shows (the published answers were paraphrased by a language model, and `our-dataset` trains on its test
templates); texts with commas are quoted; splits are seeded and keep equal images, and with --group a patient's slices, together.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import setting
from engine.data.masked_questions import check_data_root, find_annotations
from engine.data.prepare.prs_med import SetPreparation, prepare_set
from engine.data.starter.masked_questions import build_lesions
from engine.errors import InputError
from engine.files import refuse_overwriting, write_json

logger = logging.getLogger(__name__)
SHOWN = 5  # bad rows in the log


@dataclass
class CheckArguments:
    """The check of a data root."""

    ann_paths: str | None = setting(None, "Check these annotations only. None: all in annotations/.", metavar="CSV,CSV")
    report: str | None = setting(None, "Write the lists behind the check's counts as JSON.", metavar="FILE")


def main(argv: list[str]) -> dict:
    options, checked = parse_arguments((SetPreparation, CheckArguments), argv, recipe="prs_med_prepare", description=__doc__)
    if not options.dataset:
        if options.images or options.masks:
            raise InputError("--dataset is missing: the name of the set to make of --images and --masks")
        return check(options.data_root, checked, options.mask_values)
    if not options.data_root:
        raise InputError("--data_root is missing: the folder in which to make the set")
    if options.masks and not options.images:
        raise InputError("--images is missing: the folder whose masks are in --masks")
    headline = prepare_set(options)
    logger.info("%d rows in %s", sum(headline[f"{split}_rows"] for split in ("train", "val", "test")), headline["annotations"])
    return headline


def check(data_root: str, args: CheckArguments, mask_values: str | None) -> dict:
    """What the data root, or without one the starter data, hold and lack."""
    root = Path(data_root or build_lesions())
    report = check_data_root(root, args.ann_paths, mask_values)
    for path in find_annotations(root, args.ann_paths):
        refuse_overwriting({"--report": args.report}, {"--ann_paths": path})
    for name, counts in report["sets"].items():
        logger.info("%s: %s", name, ", ".join(f"{count} {split}" for split, count in counts.items()))
    for name in report["missing_sets"]:
        logger.info("%s: not there", name)
    if report["united_masks"]:
        logger.info("%d rows whose mask is in several files, united", report["united_masks"])
    for line in report["bad_rows"][:SHOWN]:
        logger.info("%s", line)
    if len(report["bad_rows"]) > SHOWN:
        logger.info("and %d more bad rows (--report FILE lists them)", len(report["bad_rows"]) - SHOWN)
    if args.report:
        write_json(args.report, report)
    counts = {name: len(report[name]) for name in ("missing_files", "bad_rows")}
    found = {name: report[name] for name in ("sets", "missing_sets", "united_masks")}
    return {"data_root": str(root), **found, **counts}


if __name__ == "__main__":
    run_command(main)
