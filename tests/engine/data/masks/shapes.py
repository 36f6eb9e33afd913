"""Lesions to draw masks of."""

import io
from typing import Any

import numpy as np
from PIL import Image

SHAPE = (160, 200)


def disk(x: int, y: int, radius: int = 20) -> np.ndarray:
    """[160, 200] bool."""
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


A, B = disk(50, 40), disk(150, 120, 15)  # apart
CORE, AROUND = disk(50, 40, 10), disk(50, 40, 23)  # inside A, and around it


def painted(*parts: tuple[np.ndarray, Any], ground: Any = 0) -> np.ndarray:
    """Where (mask, value) say, one over the other: uint8, [H, W] or [H, W, 3]."""
    channels = (3,) if any(np.ndim(value) for _, value in parts) else ()
    picture = np.zeros((*SHAPE, *channels), np.uint8) + np.uint8(ground)
    for part, value in parts:
        picture[part] = value
    return picture


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(content, kind, **options)
    return content.getvalue()


def palette(indices: np.ndarray, colours: dict[int, tuple[int, int, int]]) -> Image.Image:
    """A palette image of indices [H, W]; other colours are black."""
    image = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    image.putpalette([channel for i in range(256) for channel in colours.get(i, (0, 0, 0))])
    return image


def dice(found: np.ndarray, meant: np.ndarray) -> float:
    return 2 * (found & meant).sum() / (found.sum() + meant.sum())
