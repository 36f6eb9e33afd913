"""The image and the masks of a lesion, by its image_id, in folders that may hold either under one name."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.images import ImageError, open_image
from engine.data.masks.names import SUFFIXES, MaskNames
from engine.data.rows import BadRow
from engine.errors import InputError
from engine.files import visible_files

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
TWO_TONES = 0.99  # of a mask's pixels at least are nearly black or nearly white


def looks_like_mask(image: Image.Image) -> bool:
    """Whether an RGB image is black and white: no photograph is."""
    pixels = np.asarray(image).astype(np.int16)
    grey = (pixels.max(axis=-1) - pixels.min(axis=-1)).max() <= 25
    levels = pixels[..., 0]
    if not grey or levels.min() == levels.max():
        return False
    few = len(np.unique(levels)) == 2
    return few or bool(((levels <= 25) | (levels >= 230)).mean() >= TWO_TONES)


class LesionFiles:
    """JPEG and PNG images, and masks of any kind, in folders and the folders in them."""

    def __init__(self, images: Sequence[Path], masks: Sequence[Path] = ()) -> None:
        """`masks`: where these are looked for; by default among the images."""
        self.images: dict[str, list[Path]] = {}
        files = [path for folder in images for path in visible_files(folder, "**/*")]
        for path in dict.fromkeys(files):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self.images.setdefault(path.stem, []).append(path)
        apart = [path for folder in masks for path in visible_files(folder, "**/*")]
        self.apart = {path.resolve() for path in apart}
        self.masks = MaskNames((path.stem, path) for path in dict.fromkeys(apart or files) if path.suffix.lower() in SUFFIXES)

    def find(self, name: str) -> tuple[Path | None, tuple[Path, ...]]:
        """(image, masks) of an image_id, None and () where there are none. BadRow where it is not clear which files are meant."""
        found = self.images.get(name, [])
        others = [path for path in found if path.resolve() not in self.apart]
        found = others or found
        alike: list[Path] = []
        if len(found) > 1:
            found, alike = self._tell_apart(name, found)
        image = found[0] if found else None
        beside = image is not None and image.resolve() in {path.resolve() for path in self.masks.exact.get(name, [])}
        try:
            masks = self.masks.masks_of(name, in_one_folder=beside or not self.apart)
        except InputError as error:
            raise BadRow(str(error), "one mask, or several that are numbered") from None
        return image, masks or tuple(alike[:1])

    def _tell_apart(self, name: str, found: list[Path]) -> tuple[list[Path], list[Path]]:
        """Files of one name -> ([the image] or [], those that are masks)."""
        contents = {path: path.read_bytes() for path in found}
        found = [path for i, path in enumerate(found) if contents[path] not in [contents[other] for other in found[:i]]]
        if len(found) == 1:
            return found, []
        masks = [path for path in found if self._is_mask(path)]
        images = [path for path in found if path not in masks]
        if len(images) > 1 or len(masks) > 1:
            several = images if len(images) > 1 else masks
            raise BadRow(
                f"{'image' if several is images else 'mask'} {name[:80]!r}: {several[0]} or {several[1]}", "one file of this name"
            )
        return images, masks

    @staticmethod
    def _is_mask(path: Path) -> bool:
        try:
            return looks_like_mask(open_image(path))
        except ImageError:
            return False
