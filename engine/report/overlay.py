"""Masks and boxes drawn over their image, and pictures written whole."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from engine.errors import InputError
from engine.files import refuse_overwriting, write_whole

PREDICTED, TRUTH, PROMPT = (255, 64, 64), (64, 224, 96), (255, 255, 0)
TINT = 0.35  # share of the mask's colour inside it


def draw_overlay(
    image: Image.Image,
    mask: np.ndarray | None = None,
    *,
    truth: np.ndarray | None = None,
    region: np.ndarray | None = None,
    box: Sequence[float] | None = None,
    predicted_box: Sequence[float] | None = None,
    true_box: Sequence[float] | None = None,
) -> Image.Image:
    """A copy of the image in RGB with what is given drawn over it: red is predicted, green is true, yellow is what was asked about.

    Of the masks [H, W] `mask` is tinted with its edge in full colour, of `truth` and of the `region` asked about the edge alone.
    Boxes are (x1, y1, x2, y2) in pixels; a `predicted_box` may be any four numbers.
    """
    drawn = image.convert("RGB")
    if mask is not None:
        drawn = Image.composite(Image.blend(drawn, Image.new("RGB", drawn.size, PREDICTED), TINT), drawn, _as_image(mask))
    edge = max(3, min(drawn.size) // 150 | 1)
    for part, colour in ((region, PROMPT), (truth, TRUTH), (mask, PREDICTED)):
        if part is not None:
            drawn.paste(colour, mask=_edge(part, edge))
    thin, thick = max(1, min(drawn.size) // 300), max(2, round(min(drawn.size) / 55))
    for corners, colour, width in ((box, PROMPT, thin), (true_box, TRUTH, thick), (predicted_box, PREDICTED, thick // 2)):
        if corners is not None:  # the thinner predicted box lies on the true one and hides nothing of it
            x1, y1, x2, y2 = corners
            sides = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
            ImageDraw.Draw(drawn).rectangle(sides, outline=colour, width=width)
    return drawn


def _as_image(mask: np.ndarray) -> Image.Image:
    return Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255)


def _edge(mask: np.ndarray, width: int) -> Image.Image:
    """The pixels of a mask within half of `width` (odd, in pixels) of its edge."""
    region = _as_image(mask)
    return Image.fromarray(np.asarray(region) - np.asarray(region.filter(ImageFilter.MinFilter(width))))


def mask_output(out: str | None, inputs: Mapping[str, str | None]) -> Path | None:
    """`--out` as a path. InputError if it is a folder, or if it or its overlay is one of the files read, {flag: file}."""
    if not out:
        return None
    if os.path.isdir(out):
        raise InputError(f"--out {out}: is a folder (expected a file to write)")
    refuse_overwriting({"--out": out, "the overlay of --out,": overlay_path(Path(out))}, inputs)
    return Path(out)


def overlay_path(mask: Path) -> Path:
    """Where the mask drawn over its image is written."""
    return mask.with_suffix(".overlay.png")


def write_png(path: str | Path, image: Image.Image) -> str:
    """Write the image as PNG, and return the path as text. InputError if it cannot be written there."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    try:
        return str(write_whole(path, buffer.getvalue()))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
