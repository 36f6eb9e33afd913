"""Med-R1, data: the published OmniMedVQA splits and images become a folder that `recipes.medr1_grpo` trains on.

    python -m recipes.medr1_prepare --splits Splits --images OmniMedVQA --output data/CT_384 --names CT
    python -m recipes.medr1_grpo --dataset_name data/CT_384

`Splits` is the folder of Med-R1's repository, `OmniMedVQA` the one that holds `Images/`. Training images are resized to 384 x 384
beforehand, as in the paper; test images stay as they are. The last line counts train and test rows, missing images, bad rows
(those left out, for a missing image or another reason) and leaked rows: test questions about an image that train shows too.
DIR/report.json lists each of them.

The published code has no such step: it loads Arrow folders that none of its scripts builds. Its split is by row, and 1,912 of the
17,662 test rows of the modality files show an image that also occurs in train (by path, and without the MR training file). They
stay by default, since the published numbers have them; `--drop_leaked` takes their images out of train.
"""

import argparse

from engine.command.run import run_command
from engine.data.prepare.omnimedvqa import Preparation, prepare


def parse_arguments(argv: list[str] | None) -> Preparation:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m recipes.medr1_prepare",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--splits", required=True, metavar="DIR", help="Med-R1's Splits folder")
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder that holds Images/, with which paths begin")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--kind", choices=("modality", "question_type"), default="modality", help="which splits (modality)")
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="e.g. CT MRI 'Lesion Grading', short or as published (default: all files there)"
    )
    parser.add_argument("--size", type=int, default=384, help="side of the training images in pixels (384)")
    parser.add_argument("--resize_test", action="store_true", help="resize test images too")
    parser.add_argument("--drop_leaked", action="store_true", help="take images that also occur in test out of train")
    parser.add_argument(
        "--on_bad_row", choices=("error", "skip"), default="error", help="stop at a bad row, or list and skip (error)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this command made")
    return Preparation(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> dict:
    return prepare(parse_arguments(argv))


if __name__ == "__main__":
    run_command(main)
