"""Masks and boxes drawn over their image, and pictures written whole."""

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from engine.errors import InputError
from engine.files import refuse_overwriting, write_whole

PREDICTED, TRUTH, PROMPT = (255, 64, 64), (64, 224, 96), (255, 255, 0)
SLICES, SLICE_SIDE = 12, 320  # most of a volume that are drawn with a mask in them, and pixels of their longer side, about
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


def draw_slices(
    pictures: Callable[[int], Image.Image], mask: np.ndarray, truth: np.ndarray | None, boxes: Mapping[int, Sequence[float] | None]
) -> Image.Image:
    """Slices of a volume as one sheet: those of the boxes and up to SLICES of those where the mask [S, H, W] is, evenly spread.

    `pictures(s)` is slice s, all of one size. Small ones are enlarged, so that the edges drawn over them are thin.
    """
    some = np.flatnonzero(mask.any((1, 2)))
    spread = some[np.linspace(0, len(some) - 1, min(SLICES, len(some))).round().astype(int)] if len(some) else some
    tiles = []
    for index in sorted({*map(int, spread), *boxes} or {len(mask) // 2}):
        picture, box = pictures(index), boxes.get(index)
        scale = max(1, round(SLICE_SIDE / max(picture.size)))
        large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        masks = (None if part is None else part[index].repeat(scale, 0).repeat(scale, 1) for part in (mask, truth))
        drawn, true = masks
        tiles.append(draw_overlay(large, drawn, truth=true, box=None if box is None else [side * scale for side in box]))
    columns, (width, height) = math.ceil(math.sqrt(len(tiles))), tiles[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * width, place // columns * height))
    return sheet


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
