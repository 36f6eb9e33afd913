"""Skin diagnosis, data: HAM10000's metadata, images and masks become a folder with lesion boxes, split by lesion.

    python -m recipes.skin_prepare
    python -m recipes.skin_prepare --metadata HAM10000/HAM10000_metadata.csv --output data/skin
    python -m recipes.skin_prepare --metadata HAM10000_metadata.csv --images HAM10000_images_part_1 HAM10000_images_part_2 \\
        --masks HAM10000_segmentations --output data/skin

The second command finds images (<image_id>.jpg) and masks (<image_id>_segmentation.png) beside the metadata and in the folders
there; with no flags the starter data are made: lesions of seven kinds drawn on real images. DIR/ham10000_with_spatial_data.json and
.csv hold all records in the published format, DIR/train.json and DIR/test.json those of either part, DIR/images and DIR/masks the
files as they are, so that the published scripts train on the folder too. The last line is JSON: train_rows, test_rows,
missing_images (rows without an image, left out), missing_masks (kept, with nulls), bad_rows (damaged files, empty masks, unknown
diagnoses: --on_bad_row), lesions_shared_by_image_split; DIR/report.json lists each of them.

As in the published code (https://github.com/rasoulcarrera/DR_Diag_Skin_main, the version its README describes), the box is the
bounding rectangle of the mask's largest region, area_coverage is that region's contour area over the image's, and
spatial_description names one of nine regions, whose outer ones are a fifth of the image wide. The differences: flags instead of
paths in the code; an unreadable or empty mask stops the command or is listed, where a row went silently; null where pandas writes
NaN, which is no JSON; and the split. The published one is by image, so that photographs of one lesion lie in both parts (HAM10000
has 10,015 images of 7,470 lesions): lesions_shared_by_image_split counts them for the same fraction and seed. Here a lesion lies
in one part, together with any other that shares an image with the same pixels.
"""

import logging

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.data.prepare.ham10000 import SkinPreparation, prepare_skin
from engine.data.starter.lesions import starter_headline

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> dict:
    (options,) = parse_arguments(SkinPreparation, argv, recipe="skin_prepare", description=__doc__)
    if not argv:
        headline = starter_headline()
        logger.info("starter data in %(output)s: %(train_rows)d train rows and %(test_rows)d test rows", headline)
        return headline
    return prepare_skin(options)


if __name__ == "__main__":
    run_command(main)
