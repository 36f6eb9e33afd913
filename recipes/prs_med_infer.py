"""PRS-Med, inference: a question about an image is answered in words and with a mask (arXiv:2505.11872).

    python -m recipes.prs_med_infer --model CHECKPOINT --image IMAGE --question "Where is the tumor in this brain MRI?"

IMAGE is PNG, JPEG, TIFF, BMP or DICOM. Writes the mask as a PNG of 0 and 255 in the image's own size (--out, else mask.png in a new
run folder) and, beside it, .overlay.png: the mask tinted and its edge drawn, with --mask the true edge in green. With no flags: the
newest checkpoint of `recipes.prs_med_train` on the first starter test row. The last line is JSON: answer, places (read from the
answer by fixed rules), mask, overlay, area (pixels), dice (with --mask), seconds.

CHECKPOINT is a folder of `recipes.prs_med_train`, or a published `llm_seg_N` with --vlm_path. Differences from the published
infer.py: images are normalised as in training and the answer is greedy; and, which `--compat reference` takes back, the trained
adapters are applied (there they are silently lost), the prompt is that of training, and the mask is where its probability passes a
half (there it is first stretched to its full range).
"""

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.command.run import describe_device, local_device, open_run, run_command
from engine.data.images import open_image
from engine.data.masked_questions import load_masked_questions, read_mask
from engine.data.positions import read_positions
from engine.data.starter.masked_questions import build_lesions
from engine.errors import InputError, input_errors
from engine.evaluation.mask_metrics import dice_score
from engine.evaluation.masks import newest_checkpoint, to_levels
from engine.report.overlay import draw_overlay, write_png
from models.prs_med.model import load_prs_med

logger = logging.getLogger(__name__)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m recipes.prs_med_infer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="the checkpoint folder (default: the newest one of recipes.prs_med_train)")
    parser.add_argument("--vlm_path", help="where the VLM is, if not where the checkpoint says")
    parser.add_argument("--image", help="the image file (default: the first starter test image, and its question)")
    parser.add_argument("--question", help="the question about it")
    parser.add_argument("--out", help="the mask to write (default: mask.png in a new run folder)")
    parser.add_argument("--mask", help="the true mask, to compute Dice and to draw")
    parser.add_argument(
        "--compat", choices=("default", "reference"), default="default", help="infer well, or as the published code (default)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer in tokens (64)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> dict:
    args = parse(argv)
    image, question, truth = read_input(args)
    device = local_device()
    checkpoint = args.model or newest_checkpoint("prs_med_train", "prs_med.json")
    with input_errors("--model"):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = load_prs_med(checkpoint, vlm=args.vlm_path, dtype=dtype, compat=args.compat)
    model.to(device)
    logger.info("%s on %s: %s", checkpoint, describe_device(), question)

    start = time.perf_counter()
    answer, logits = model.segment(image, question, max_new_tokens=args.max_new_tokens)
    mask = to_levels(logits, args.compat) >= 128
    seconds = time.perf_counter() - start

    out = Path(args.out) if args.out else open_run("prs_med_infer").path / "mask.png"
    places = [position.place for position in read_positions(answer)]
    result = {"answer": answer, "places": places, "mask": write_png(out, Image.fromarray(mask).convert("L"))}
    result["overlay"] = write_png(out.with_suffix(".overlay.png"), draw_overlay(image, mask, truth=truth))
    result["area"] = int(mask.sum())
    if truth is not None:
        result["dice"] = dice_score(mask, truth)
    return result | {"seconds": seconds}


def read_input(args: argparse.Namespace) -> tuple[Image.Image, str, np.ndarray | None]:
    """The image, the question, and the true mask [H, W] bool if there is one."""
    if args.max_new_tokens < 0:
        raise InputError("--max_new_tokens must be at least 0")
    if args.image is None:
        if args.question or args.mask:
            raise InputError("--image is missing: the file that the question is about")
        row = load_masked_questions(build_lesions(), split="test", limit=1)[0]
        return row["image"], row["question"], np.asarray(row["mask"]) > 0
    if not (args.question or "").strip():
        raise InputError('--question is missing, e.g. "Where is the tumor in this image?"')
    image = open_image(args.image)
    return image, args.question, None if args.mask is None else read_mask(args.mask, image)


if __name__ == "__main__":
    run_command(main)
