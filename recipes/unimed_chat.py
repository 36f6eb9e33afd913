"""Uni-MedVLM, chat in a terminal: an image and a question, about all of it or a region, answered in words and with masks drawn.

    python -m recipes.unimed_chat
    python -m recipes.unimed_chat --model OUT5/stage5 --image liver.png --question "Could you segment out the liver in this image?"
    python -m recipes.unimed_chat --model OUT5/stage5 --image liver.png --box 40,50,120,130 --question "What is in this region?"

`--region` is a mask file, `--box` x1,y1,x2,y2 in pixels. With an image and no question it asks for questions line by line, until
one is empty. With no flags: a held-out image of the starter data, its question for a mask, and what the newest run of stage 5, or
else of stage 4, has left.

The run folder gets answer_N.png for each answer with a mask: the image with the masks in red, the region in yellow. The last line
is JSON: question, answer, masks (the share of the image that each covers), pictures, seconds, output; of the last question.
"""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import RunFolder, open_run
from engine.command.settings import ALLOW_BURNED_IN, refuse, setting
from engine.command.unimed_settings import newest_whole
from engine.data.formats.text import is_unicode
from engine.data.images import open_image
from engine.errors import InputError, input_errors

logger = logging.getLogger(__name__)


@dataclass
class ChatArguments:
    """A model, an image and questions."""

    model: str | None = setting(None, "Checkpoint folder. None: that of the newest run of stage 5, or else of 4.")
    image: str | None = setting(None, "Image or scan.nii.gz#slice=9. None: a held-out image of the starter data.", metavar="FILE")
    question: str | None = setting(None, "What is asked. None: read from the terminal, a line each.")
    box: str | None = setting(None, "The region that is asked about: x1,y1,x2,y2 in pixels.", metavar="BOX")
    region: str | None = setting(None, "The region as a mask file.", metavar="FILE")
    max_new_tokens: int = setting(128, "Longest answer in tokens.", at_least=1, at_most=2**17)
    output_dir: str | None = setting(None, "Run folder. None: runs/unimed_chat/<time>.")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)

    def __post_init__(self):
        refuse([(self.box is None or self.region is None, "--box and --region are two ways to name one region: give one of them")])
        refuse([(bool(self.image) or not (self.box or self.region or self.question), "--image is missing: what is asked about")])


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(ChatArguments, argv, recipe="unimed_chat", description=__doc__)
    row = read_input(args)
    checkpoint = args.model or newest_whole()

    # Imported once the flags are known to be good, since these take seconds.
    from engine.device import inference_dtype, local_device, one_thread_if_small
    from engine.rollout.grounded import GroundedAnswers
    from engine.tasks.mecovqa.task import MeCoVQATask
    from models.uni_medvlm.checkpoints.loading import load_pretrained

    device, task = local_device(), MeCoVQATask()
    with input_errors("--model"):
        policy = load_pretrained(checkpoint, dtype=inference_dtype(device))
    one_thread_if_small(policy.model.origin.llm is None, device)
    policy.model.to(device).eval().requires_grad_(False)
    run = open_run("unimed_chat", args.output_dir)
    run.write_json("config.json", asdict(args))
    answers, last = GroundedAnswers(policy, task.prompt, args.max_new_tokens), {}
    for number, question in enumerate(questions(args, row)):
        start, asked = time.perf_counter(), row | asked_about(question, row["region"])
        refuse([(is_unicode(question), f"question {question[:60]!r}: expected UTF-8 text")])
        token = policy.processor.own_token_in(task.prompt(asked))
        refuse([(token is None, f"a question cannot have {token} in it, which is the model's own")])
        (answer,) = answers([asked])
        logger.info("%s", answer.text)
        last = {"question": question, "answer": answer.text} | draw(run, number, asked, answer)
        last |= {"seconds": time.perf_counter() - start}
    refuse([(bool(last), "nothing was asked (expected --question, or a line on standard input)")])
    return last | {"output": str(run.path)}


def read_input(args: ChatArguments) -> dict[str, Any]:
    """A row without its question; of the starter data with one."""
    from PIL import Image, ImageDraw

    from engine.data.masks.pair import open_mask
    from engine.data.mecovqa.rows import load_mecovqa
    from engine.data.starter.unimed import build_starter_unimed

    if args.image is None:
        return load_mecovqa(build_starter_unimed(), split="test", kinds=["grounding"])[0] | {"masks": []}
    with input_errors("--image, --region"):
        image = open_image(args.image)
        region = open_mask(Path(args.region), "nonzero") if args.region else None
    if args.box:
        corners = [part.strip() for part in args.box.split(",")]
        if len(corners) != 4 or not all(part.isdecimal() and len(part) < 10 for part in corners):
            raise InputError(f"--box {args.box}: expected four whole numbers, x1,y1,x2,y2")
        x1, y1, x2, y2 = map(int, corners)
        if not (x1 < x2 <= image.width and y1 < y2 <= image.height):
            raise InputError(f"--box {args.box}: expected x1 < x2 and y1 < y2 within {image.width} x {image.height} pixels")
        region = Image.new("L", image.size)
        ImageDraw.Draw(region).rectangle((x1, y1, x2 - 1, y2 - 1), fill=255)
    if region is not None and (region.size != image.size or not region.getbbox()):
        raise InputError(f"--region {args.region}: expected a mask of {image.width} x {image.height} pixels that covers something")
    return {"images": [image], "image_id": None, "region": region, "history": [], "masks": []}


def questions(args: ChatArguments, row: dict) -> Iterator[str]:
    """The one that was given, the starter row's, or those that are typed."""
    if args.question or "question" in row:
        yield args.question or row["question"]
        return
    while True:
        if sys.stdin.isatty():
            print("? ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline().strip()):
            return
        yield line


def asked_about(question: str, region: Any) -> dict[str, Any]:
    """The question's columns: a region stands where the question says [region], or behind it."""
    before, place, after = question.partition("[region]")
    parts = [{"type": "text", "text": before if place or region is None else f"{question} "}]
    if region is not None:
        parts += [{"type": "region"}, {"type": "text", "text": after}]
    return {"question": question, "question_parts": [part for part in parts if part.get("text") != ""]}


def draw(run: RunFolder, number: int, row: dict, answer: Any) -> dict[str, Any]:
    """Write the picture of an answer with masks, or about a region."""
    import numpy as np

    from engine.report.overlay import draw_overlay, write_png

    masks = [levels >= 128 for levels in answer.masks]
    shares, region = [float(mask.mean()) for mask in masks], None if row["region"] is None else np.asarray(row["region"])
    if not masks and region is None:
        return {"masks": shares, "pictures": []}
    file = run.path / f"answer_{number}.png"
    write_png(file, draw_overlay(row["images"][0], np.any(masks, axis=0) if masks else None, region=region))
    return {"masks": shares, "pictures": [str(file)]}


if __name__ == "__main__":
    run_command(main)
