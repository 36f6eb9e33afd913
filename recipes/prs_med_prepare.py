"""PRS-Med, data: a data root is checked, or images and masks become a set of one (arXiv:2505.11872, section 3).

    python -m recipes.prs_med_prepare --data_root data/prs-med-dataset
    python -m recipes.prs_med_prepare --data_root data --dataset busi --images BUSI --masks BUSI --modality "breast ultrasound"
    python -m recipes.prs_med_prepare --data_root data --dataset mine --modality "head CT slice" --finding tumor

The first form reads every row, image and mask and says what is there and what is missing; its last line is JSON: data_root, sets
(rows per split), missing_sets, and counts of missing_files and bad_rows (--report FILE gets the lists). Without flags it checks the
starter data. The second form makes DATA/busi and its annotations; the third only the annotations, of split folders that are there
already. Their last line is JSON: train_rows, val_rows, test_rows, left_out, majority (the place a constant answer should name) and
its share, annotations.

Positions follow the published rules: --rule prs-med (bounding box, "center", near within a fifth of the width) or our-dataset
(centroids of the two largest regions, near within 20 pixels). Differences: questions and answers come from our own templates, whose
test part training never shows (the published answers were paraphrased by a language model, and `our-dataset` trains on its test
templates); texts with commas are quoted; splits are seeded and keep equal images, and with --group a patient's slices, together.
"""

import argparse
import logging

from engine.command.run import run_command
from engine.data.masked_questions import check_data_root
from engine.data.positions import RULES
from engine.data.prepare.prs_med import SetPreparation, prepare_set
from engine.data.starter.masked_questions import build_lesions
from engine.errors import InputError
from engine.files import write_json

logger = logging.getLogger(__name__)
SHOWN = 5  # bad rows in the log


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m recipes.prs_med_prepare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_root", metavar="DIR", help="the folder of the sets and of annotations/ (default: starter data)")
    parser.add_argument("--ann_paths", metavar="CSV,CSV", help="check these annotations only (default: all in annotations/)")
    parser.add_argument("--report", metavar="FILE", help="write the lists behind the check's counts as JSON")
    parser.add_argument("--dataset", metavar="NAME", help="make this set")
    parser.add_argument("--images", metavar="DIR", help="its images: PNG, JPEG, TIFF, BMP or DICOM, also in folders")
    parser.add_argument("--masks", metavar="DIR", help="its masks, of the same names, also ending in _mask or _Segmentation")
    parser.add_argument("--finding", default="tumor", help="what the masks show, as the questions call it (tumor)")
    parser.add_argument("--modality", default="medical image", help="what the images are (medical image)")
    parser.add_argument("--rule", choices=RULES, default="prs-med", help="how masks become positions (prs-med)")
    parser.add_argument("--fractions", default="0.7,0.1,0.2", metavar="T,V,T", help="of train, val and test (0.7,0.1,0.2)")
    parser.add_argument("--group", metavar="REGEX", help="images whose names match it alike stay in one split, e.g. '^(\\d+)_'")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--on_bad_row", choices=("error", "skip"), default="error", help="stop at an unusable image, or list and skip (error)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> dict:
    args = parse(argv)
    if args.dataset is None:
        if args.images or args.masks:
            raise InputError("--dataset is missing: the name of the set to make of --images and --masks")
        return check(args)
    if args.data_root is None:
        raise InputError("--data_root is missing: the folder in which to make the set")
    if args.masks and not args.images:
        raise InputError("--images is missing: the folder whose masks are in --masks")
    kept = ("data_root", "dataset", "images", "masks", "finding", "modality", "rule", "group", "seed", "on_bad_row")
    headline = prepare_set(SetPreparation(fractions=read_fractions(args.fractions), **{name: getattr(args, name) for name in kept}))
    logger.info("%d rows in %s", sum(headline[f"{split}_rows"] for split in ("train", "val", "test")), headline["annotations"])
    return headline


def check(args: argparse.Namespace) -> dict:
    root = args.data_root or build_lesions()
    report = check_data_root(root, args.ann_paths)
    for name, counts in report["sets"].items():
        logger.info("%s: %s", name, ", ".join(f"{count} {split}" for split, count in counts.items()))
    for name in report["missing_sets"]:
        logger.info("%s: not there", name)
    for line in report["bad_rows"][:SHOWN]:
        logger.info("%s", line)
    if len(report["bad_rows"]) > SHOWN:
        logger.info("and %d more bad rows (--report FILE lists them)", len(report["bad_rows"]) - SHOWN)
    if args.report:
        write_json(args.report, report)
    counts = {name: len(report[name]) for name in ("missing_files", "bad_rows")}
    return {"data_root": str(root), "sets": report["sets"], "missing_sets": report["missing_sets"], **counts}


def read_fractions(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--fractions {text}: expected three numbers, of train, val and test") from None
    if min(train, val, test) < 0 or abs(train + val + test - 1) > 1e-6:
        raise InputError(f"--fractions {text}: expected three fractions whose sum is 1")
    return train, val, test


if __name__ == "__main__":
    run_command(main)
