"""An image and the mask that belongs to it, in files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.images import ImageError, count_pages, decode_stored, image_error, read_image_file
from engine.data.loaders.decoded import open_decoded
from engine.data.masks.chosen import read_mask_values
from engine.data.masks.colours import find_lesion
from engine.data.masks.levels import UnclearMask
from engine.errors import InputError

EXPECTED = "a mask of 0 and one other value"
SHAPE_TOLERANCE = 0.02  # a mask may have another size than its image; its height / width differs by at most this fraction


@dataclass(frozen=True)
class ImageAndMask:
    """Files that belong together: the mask may be in several, each with other lesions. `mask_values` as the flag says it."""

    image: Path
    mask: Path
    more_masks: tuple[Path, ...] = ()
    mask_values: str | None = None

    @property
    def masks(self) -> tuple[Path, ...]:
        return (self.mask, *self.more_masks)

    @property
    def key(self) -> str:
        return "|".join(map(str, (self.image, *self.masks, f"mask_values={self.mask_values}")))

    def stamp(self) -> list[int]:
        """Sizes and times of the files: what tells that one changed."""
        status = [path.stat() for path in (self.image, *self.masks)]
        return [number for file in status for number in (file.st_size, file.st_mtime_ns)]

    def open(self) -> tuple[Image.Image, Image.Image]:
        """(RGB image, mask of its size: L, 0 and 255). ImageError, whose reason says which file, if they cannot be used."""
        return self.open_as(open_decoded)

    def open_as(self, open_image: Callable[[Path], Any]) -> tuple[Any, Image.Image]:
        """The same with an image of another kind, which has a PIL image's `size`, `width` and `height`."""
        try:
            image = open_image(self.image)
        except ImageError as error:
            raise image_error(str(self.image), f"image {self.image.name!r}: {error.reason}") from None
        lesions = np.zeros((image.height, image.width), bool)
        for path in self.masks:
            mask = open_mask(path, self.mask_values)
            if abs(mask.height * image.width / (mask.width * image.height) - 1) > SHAPE_TOLERANCE:
                sizes = f"mask {path.name!r} is {mask.width} x {mask.height}, its image {image.width} x {image.height}"
                raise image_error(str(path), sizes)
            mask = mask if mask.size == image.size else mask.resize(image.size, Image.Resampling.NEAREST)
            lesions |= np.asarray(mask) > 0
        return image, Image.fromarray(lesions.astype(np.uint8) * 255)


def open_mask(path: Path, mask_values: str | None = None) -> Image.Image:
    """The mask file as L, 0 and 255, upright. ImageError if it cannot be read or it is not clear which of its values are meant."""
    try:
        return decode_mask(read_image_file(path), str(path), mask_values)
    except ImageError as error:
        raise image_error(str(path), f"mask {path.name!r}: {error.reason}", error.expected) from None


def decode_mask(data: bytes, name: str, mask_values: str | None = None) -> Image.Image:
    """The bytes of a mask file as L, 0 and 255; `name` is what an ImageError calls it."""
    stored = decode_stored(data, name)
    if (pages := count_pages(data)) > 1:
        raise image_error(name, f"it has {pages} pages, where one is read: save each as a mask of its own", EXPECTED)
    try:
        lesion = find_lesion(stored) if mask_values is None else read_mask_values(mask_values).select(stored)
    except UnclearMask as error:
        raise image_error(name, str(error), EXPECTED) from None
    return Image.fromarray(lesion.astype(np.uint8) * 255)


def read_mask(path: str | Path, image: Image.Image, mask_values: str | None = None) -> np.ndarray:
    """[H, W] bool: the mask file that belongs to an image; InputError if it cannot be read or is of another size."""
    mask = open_mask(Path(path), mask_values)
    if mask.size != image.size:
        raise InputError(f"{path}: the mask is {mask.width} x {mask.height}, the image {image.width} x {image.height}")
    return np.asarray(mask) > 0


def is_plain_mask(path: Path, mask: Image.Image) -> bool:
    """Whether the file holds 0 and 255 just as `mask` (L), for whoever reads its pixels without any thought."""
    try:
        with Image.open(path, formats=["PNG"]) as stored:
            return (
                stored.mode in ("1", "L")
                and not stored.getexif()
                and np.array_equal(np.asarray(stored.convert("L")), np.asarray(mask))
            )
    except OSError:
        return False
