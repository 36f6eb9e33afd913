"""Uni-MedVLM, data: the first rows of MeCoVQA's grounding file whose image and mask are there, with those files (stage 3).

    python -m recipes.unimed_grounding_subset
    python -m recipes.unimed_grounding_subset --data SAMed2Dv1/train/MeCoVQA-Grounding.json --output data/grounding
    python -m recipes.unimed_grounding_subset --data SAMed2Dv1/train/MeCoVQA-Grounding.json --check_only

This is create_grounding_subset.py of https://github.com/AmberGTP5/MedPLIB_FILA: of the first 15,000 rows those are kept whose image
and mask are there, under their name or that and `.png`. Their files are copied to DIR/images and DIR/masks, unless they are there
already; DIR/train/MeCoVQA-Grounding.json has the rows, their paths relative as they were, and DIR/missing_files_log.txt a line for
each file that was not found. `--check_only` counts and writes nothing; without flags it does so with the starter data. The last
line is JSON: total, kept, skipped (also rows without image, answer or mask tag), missing_images, missing_masks, fixed_names, files,
copied, data, log, output.

`--check_data` is test_dataset.py: the first row that can be used is opened, and type, shape and values of what it holds are shown.
`--check_model` is test_model_init.py: the networks are built, as stage 3 trains them, and what is trained is counted.

Differences from the published script: flags instead of paths in the code; names without `.png` get it in the file that is written,
since its own training does not look for them with it; all masks of an answer are looked for; a path that leaves its root is refused
and has a line in the log; files deeper than images/ and masks/ keep their place, so that the rows find them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import ALLOW_BURNED_IN, check_ranges, refuse, setting
from engine.command.unimed_settings import NetworkArguments
from engine.data.prepare.grounding_subset import FIRST, find_subset, write_subset

logger = logging.getLogger(__name__)
SHOWN = 5  # lines of the log
LOOKED_AT = 100  # rows among which one can be shown


@dataclass
class SubsetArguments(NetworkArguments):
    """Which rows of which file, and which networks are looked at."""

    data: str | None = setting(None, "JSON file of grounding questions. None: the starter data.", metavar="FILE")
    image_root: str | None = setting(None, "Folder of images/ and masks/. None: that of the file or the one above.", metavar="DIR")
    output: str | None = setting(None, "Folder for rows and files.", metavar="DIR")
    first: int = setting(FIRST, "Take only so many rows, from the first on.", at_least=1)
    check_only: bool = setting(False, "Count, and write nothing.")
    check_data: bool = setting(False, "Open the first row that can be used and show what it holds; write nothing.")

    check_model: bool = setting(False, "Build the networks and count what stage 3 trains; nothing is read or written.")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)

    def __post_init__(self):
        super().__post_init__()
        check_ranges(type(self), vars(self))
        looks = self.check_only or self.check_data or self.check_model
        writes = not looks and self.data is not None
        one = sum([self.check_only, self.check_data, self.check_model]) <= 1
        refuse([(one, "--check_only, --check_data and --check_model are three things to do: give one of them")])
        refuse(
            [
                (not writes or bool(self.output), "--output is missing: the folder for rows and files (or --check_only)"),
                (writes or not self.output, "--output: nothing is written with --check_only or --check_data, or without --data"),
            ]
        )


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(SubsetArguments, argv, recipe="unimed_grounding_subset", description=__doc__)
    if args.check_model:
        return check_model(args)
    data = args.data or starter_file()
    if args.check_data:
        return check_data(data, args.image_root)
    subset = find_subset(data, args.image_root, args.first)
    for line in subset.log[:SHOWN]:
        logger.info("%s", line)
    if len(subset.log) > SHOWN:
        logger.info("and %d more lines in the log", len(subset.log) - SHOWN)
    headline = {**subset.counts(), "data": str(data)} if not args.output else write_subset(subset, data, args.output)
    logger.info(
        "%(kept)d of %(total)d rows can be used; %(missing_images)d images and %(missing_masks)d masks are missing", headline
    )
    if headline["fixed_names"]:
        logger.info("%d names lack their .png%s", headline["fixed_names"], ", and are written with it" if args.output else "")
    return headline


def starter_file() -> Path:
    from engine.data.starter.unimed import build_starter_unimed

    return build_starter_unimed() / "train" / "MeCoVQA-Grounding.json"


def check_data(data: str | Path, image_root: str | None) -> dict[str, Any]:
    """Open the first row that can be used; what it holds, in words."""
    from engine.data.mecovqa.rows import load_mecovqa

    rows = load_mecovqa(data, image_root=image_root, kinds=["grounding"], on_bad_row="skip", first=LOOKED_AT)
    sample = {key: described(value) for key, value in rows[0].items()}
    for key, text in sample.items():
        logger.info("%-15s %s", key, text)
    return {"data": str(data), "row": rows.record(0)["row"], "bad_rows_before": len(rows.skipped), "sample": sample}


def check_model(args: SubsetArguments) -> dict[str, Any]:
    """What stage 3 trains of the networks, in numbers of parameters."""
    from engine.training.config.grounding import GroundingConfig
    from engine.training.warm_up.unimed import small_networks
    from models.starter.uni_medvlm import build_tiny_unimed
    from models.uni_medvlm.checkpoints.loading import load_pretrained
    from models.uni_medvlm.checkpoints.networks import build_unimed
    from models.uni_medvlm.stages.trainable import prepare_stage, trained_by_part

    run = GroundingConfig(output_dir="unused", use_cpu=True, bf16=False)
    model = args.load(build_unimed, load_pretrained, lambda: small_networks(build_tiny_unimed), run).model
    prepare_stage(model, 3)
    return trained_by_part(model)


def described(value: Any) -> str:
    """Type, size and values of an image; anything else as it is."""
    if isinstance(value, list) and value and hasattr(value[0], "getcolors"):
        return "; ".join(map(described, value))
    if hasattr(value, "getcolors"):
        low, high = value.convert("L").getextrema()
        return f"{value.mode} image, {value.height} x {value.width} pixels, uint8, {low} to {high}"
    return f"{type(value).__name__} {value!r}"


if __name__ == "__main__":
    run_command(main)
