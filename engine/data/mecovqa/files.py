"""The files of a row of MeCoVQA: its image, the masks of its answer, the region of its question."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.formats.names import find_named
from engine.data.images import MISSING, ImageError, image_error
from engine.data.loaders.decoded import open_decoded
from engine.data.masks.pair import SHAPE_TOLERANCE, open_mask
from engine.data.rows import BadRow

SUFFIX = ".png"  # which published names sometimes lack


def find_file(root: Path, name: Any, what: str) -> Path:
    """The file called `name` or `name.png` in `root`. BadRow where there is none, or where it would lie outside of `root`."""
    if not isinstance(name, str) or not name.strip():
        raise BadRow(f"unusable {what}", f"{what}s/NAME.png, from {root}")
    path = find_named(root, name)
    if not os.path.isfile(path):  # which a name longer than any file's is not, either
        path = named if os.path.isfile(named := find_named(root, name + SUFFIX)) else path
    if not path.is_relative_to(root):  # by name: a link inside the root is its owner's choice
        raise BadRow(f"{what} path {name[:200]!r} leaves {str(root)!r}", "a path inside it")
    if not os.path.isfile(path):
        raise BadRow(f"{what} {name[:200]!r}: {MISSING}", f"a file of this name, or of this and {SUFFIX}, in {root}", str(path))
    return path


@dataclass(frozen=True)
class RowFiles:
    """Not opened yet. As a sequence it holds its images: one, or none. `mask_values`: see `engine.data.masks.chosen`."""

    image: Path | None
    masks: tuple[Path, ...] = ()
    region: Path | None = None
    mask_values: str | None = None

    def __len__(self) -> int:
        return 0 if self.image is None else 1

    def __iter__(self) -> Iterator[Path]:
        return iter(() if self.image is None else (self.image,))

    @property
    def all(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.image, *self.masks, self.region) if path is not None)

    @property
    def key(self) -> str:
        return "|".join([str(self.image), *map(str, self.masks), f"region={self.region}", f"mask_values={self.mask_values}"])

    def stamp(self) -> list[int]:
        """Sizes and times of the files: what tells that one changed."""
        status = [path.stat() for path in self.all]
        return [number for file in status for number in (file.st_size, file.st_mtime_ns)]

    def open(self) -> dict[str, Any]:
        """images: [PIL RGB] or []; masks: PIL L of the image's size, 0 or 255; region: such a one or None.

        ImageError, whose reason says which file, if one cannot be used.
        """
        path = self.image
        if path is None:
            return {"images": [], "masks": [], "region": None}
        try:
            image = open_decoded(path)
        except ImageError as error:
            raise image_error(str(path), f"image {path.name!r}: {error.reason}") from None
        masks = [self._mask(path, image) for path in self.masks]
        return {"images": [image], "masks": masks, "region": self.region and self._region(self.region, image)}

    def _region(self, path: Path, image: Image.Image) -> Image.Image:
        region = self._mask(path, image)
        if not np.asarray(region).any():
            raise image_error(str(path), f"region {path.name!r} is empty", "a region of at least one pixel")
        return region

    def _mask(self, path: Path, image: Image.Image) -> Image.Image:
        mask = open_mask(path, self.mask_values)
        if abs(mask.height * image.width / (mask.width * image.height) - 1) > SHAPE_TOLERANCE:
            sizes = f"mask {path.name!r} is {mask.width} x {mask.height}, its image {image.width} x {image.height}"
            raise image_error(str(path), sizes, "a mask of its image's shape")
        return mask if mask.size == image.size else mask.resize(image.size, Image.Resampling.NEAREST)
