"""A mask drawn over its image, and pictures written whole."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from engine.errors import InputError
from engine.files import write_whole

MASK, TRUTH, BOX = (255, 64, 64), (64, 224, 96), (255, 255, 0)
TINT = 0.35  # share of the mask's colour inside it


def draw_overlay(
    image: Image.Image, mask: np.ndarray, *, truth: np.ndarray | None = None, box: tuple[float, ...] | None = None
) -> Image.Image:
    """The image (RGB) with the mask [H, W] tinted red and its edge in full colour, the edge of `truth` green, and a box yellow."""
    region = _as_image(mask)
    drawn = Image.composite(Image.blend(image, Image.new("RGB", image.size, MASK), TINT), image, region)
    for part, colour in ((truth, TRUTH), (mask, MASK)):
        if part is not None:
            drawn.paste(colour, mask=_edge(part, max(3, min(image.size) // 150 | 1)))
    if box is not None:
        ImageDraw.Draw(drawn).rectangle(box, outline=BOX, width=max(1, min(image.size) // 300))
    return drawn


def _as_image(mask: np.ndarray) -> Image.Image:
    return Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255)


def _edge(mask: np.ndarray, width: int) -> Image.Image:
    """The pixels of a mask within half of `width` (odd, in pixels) of its edge."""
    region = _as_image(mask)
    return Image.fromarray(np.asarray(region) - np.asarray(region.filter(ImageFilter.MinFilter(width))))


def write_png(path: str | Path, image: Image.Image) -> str:
    """Write the image as PNG, and return the path as text. InputError if it cannot be written there."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    try:
        return str(write_whole(path, buffer.getvalue()))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
