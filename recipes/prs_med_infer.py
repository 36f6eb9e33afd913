"""PRS-Med, inference: a question about an image is answered in words and with a mask (arXiv:2505.11872).

    python -m recipes.prs_med_infer --model CHECKPOINT --image IMAGE --question "Where is the tumor in this brain MRI?"

IMAGE is PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM, or a slice of a volume (docs/volumes.md). Writes the mask as a PNG of 0 and 255
in the image's own size (--out, else mask.png in a new run folder) and, beside it, .overlay.png: the mask tinted and its edge
drawn, with --mask the true edge in green. With no flags: the newest checkpoint of `recipes.prs_med_train` on the first starter
test row. The last line is JSON: answer, places (read from the answer by fixed rules), mask, overlay, area (pixels), dice (with
--mask), seconds.

CHECKPOINT is a folder of `recipes.prs_med_train`, or a published `llm_seg_N` with --vlm_path. Differences from the published
infer.py: images are normalised as in training and the answer is greedy; and, which `--compat reference` takes back, the trained
adapters are applied (there they are silently lost), the prompt is that of training, and the mask is where its probability passes a
half (there it is first stretched to its full range).
"""

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import newest_output, open_run
from engine.command.settings import ALLOW_BURNED_IN, setting
from engine.data.images import open_image
from engine.data.masked_questions import load_masked_questions
from engine.data.masks.chosen import HELP, check_mask_values
from engine.data.masks.pair import read_mask
from engine.data.positions import read_positions
from engine.data.starter.masked_questions import build_lesions
from engine.errors import InputError, input_errors
from engine.report.overlay import draw_overlay, mask_output, overlay_path, write_png

logger = logging.getLogger(__name__)


@dataclass
class InferenceArguments:
    """What is asked of which model."""

    model: str | None = setting(None, "The checkpoint folder. None: the newest one of recipes.prs_med_train.", metavar="DIR")
    vlm_path: str | None = setting(None, "Where the VLM is, if not where the checkpoint says.", metavar="DIR")
    image: str | None = setting(None, "The image file. None: the first starter test image, and its question.", metavar="FILE")
    question: str | None = setting(None, "The question about it.", metavar="TEXT")
    out: str | None = setting(None, "The mask to write. None: mask.png in a new run folder.", metavar="FILE")
    mask: str | None = setting(None, "The true mask, to compute Dice and to draw.", metavar="FILE")
    mask_values: str | None = setting(None, HELP, metavar="VALUES")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)
    compat: str = setting("default", "Infer well, or as the published code does.", choices=["default", "reference"])
    max_new_tokens: int = setting(64, "Longest answer in tokens.", at_least=0, at_most=2**17)

    def __post_init__(self):
        check_mask_values(self.mask_values)


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(InferenceArguments, argv, recipe="prs_med_infer", description=__doc__)
    out = mask_output(args.out, {"--image": args.image, "--mask": args.mask})
    image, question, truth = read_input(args)

    # Imported once flags and files are known to be good, since these take seconds.
    from engine.device import describe_device, inference_dtype, local_device
    from engine.evaluation.mask_metrics import dice_score
    from engine.tasks.masks import MaskAnswers
    from models.prs_med.model import load_prs_med

    device, checkpoint = local_device(), args.model or newest_output("prs_med_train", "prs_med.json")
    with input_errors("--model"):
        model = load_prs_med(checkpoint, vlm=args.vlm_path, dtype=inference_dtype(device), compat=args.compat).to(device)
    logger.info("%s on %s: %s", checkpoint, describe_device(), question)

    start = time.perf_counter()
    segment = partial(model.segment_batch, max_new_tokens=args.max_new_tokens)
    (answer,) = MaskAnswers(segment, stretched=args.compat == "reference")([{"image": image, "question": question}])
    mask = answer.levels >= 128
    seconds = time.perf_counter() - start

    out = out or open_run("prs_med_infer").path / "mask.png"
    places = [position.place for position in read_positions(answer.text)]
    result: dict[str, Any] = {"answer": answer.text, "places": places, "mask": write_png(out, Image.fromarray(mask).convert("L"))}
    result["overlay"] = write_png(overlay_path(out), draw_overlay(image, mask, truth=truth))
    result["area"] = int(mask.sum())
    if truth is not None:
        result["dice"] = dice_score(mask, truth)
    return result | {"seconds": seconds}


def read_input(args: InferenceArguments) -> tuple[Image.Image, str, np.ndarray | None]:
    """The image, the question, and the true mask [H, W] bool if there is one."""
    if args.image is None:
        if args.question or args.mask:
            raise InputError("--image is missing: the file that the question is about")
        row = load_masked_questions(build_lesions(), split="test", limit=1)[0]
        return row["image"], row["question"], np.asarray(row["mask"]) > 0
    if not args.question or not args.question.strip():
        raise InputError('--question is missing, e.g. "Where is the tumor in this image?"')
    image = open_image(args.image)
    return image, args.question, None if args.mask is None else read_mask(args.mask, image, args.mask_values)


if __name__ == "__main__":
    run_command(main)
