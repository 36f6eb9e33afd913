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

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.data.prepare.omnimedvqa import Preparation, prepare


def main(argv: list[str]) -> dict:
    (options,) = parse_arguments(Preparation, argv, recipe="medr1_prepare", description=__doc__)
    return prepare(options)


if __name__ == "__main__":
    run_command(main)
