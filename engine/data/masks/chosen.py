"""`--mask_values`: which values of a mask are the lesion, where its user says so.

1       1,2       128-255       values of a grey mask, indices of a palette: one, several, a range
255/0/0           255/0/0,0/255/0       colours; in a file of many colours, as JPEG has, also what is near them
nonzero           all that is not 0, or not black
alpha             the alpha channel above half
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from engine.data.masks.colours import FEW_COLOURS, as_levels, describe_colours, is_grey, split_alpha
from engine.data.masks.levels import UnclearMask
from engine.errors import InputError

EXPECTED = "values (1 or 1,2), ranges (128-255), colours (255/0/0), nonzero or alpha"
HELP = "Which values of a mask are the lesion: 1 or 1,2, 128-255, 255/0/0, nonzero, alpha. None: as its values show."
NUMBER = r"\d+(?:\.\d+)?"
RANGE = re.compile(rf"({NUMBER})(?:-({NUMBER}))?")
COLOUR = re.compile(r"(\d{1,5})/(\d{1,5})/(\d{1,5})")
NEAR = 48  # of 255: how far a channel of a noisy colour may be


@dataclass(frozen=True)
class MaskValues:
    """What is the lesion: a word, ranges of values (both ends included), or colours."""

    word: str | None = None
    ranges: tuple[tuple[float, float], ...] = ()
    colours: tuple[tuple[int, ...], ...] = ()

    def select(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """A mask's stored values (see `engine.data.images.decode_stored`) -> [H, W] bool. UnclearMask where it has none such."""
        values, alpha = split_alpha(image)
        if self.word == "alpha":
            if alpha is None:
                raise UnclearMask(f"it has no alpha channel (--mask_values alpha; expected {EXPECTED})")
            return alpha > float(alpha.max()) / 2
        shown = np.ones(values.shape[:2], bool) if alpha is None else alpha > 0
        if self.word == "nonzero":
            return (values > 0).reshape(*shown.shape, -1).any(axis=-1) & shown
        if self.colours:
            return _near(_colours_of(image, values), self.colours) & shown
        if values.ndim == 3 and not is_grey(values):
            if isinstance(image, Image.Image) and image.mode == "P":
                values = np.asarray(image)
            else:
                found = describe_colours(np.unique(values.reshape(-1, 3), axis=0))
                raise UnclearMask(f"it is in colour ({found}), where --mask_values names none (expected e.g. 255/0/0)")
        levels = as_levels(values)
        return np.any([(levels >= low) & (levels <= high) for low, high in self.ranges], axis=0) & shown


@cache
def read_mask_values(text: str) -> MaskValues:
    """`--mask_values` as it is written; InputError where it means nothing."""
    parts = [part.strip() for part in text.split(",")]
    if parts in (["nonzero"], ["alpha"]):
        return MaskValues(word=parts[0])
    colours = [COLOUR.fullmatch(part) for part in parts]
    if all(colours):
        return MaskValues(colours=tuple(tuple(map(int, found.groups())) for found in colours if found))
    ranges = []
    for part in parts:
        found = RANGE.fullmatch(part)
        low, high = (float(found[1]), float(found[2] or found[1])) if found else (1.0, 0.0)
        if low > high:
            raise InputError(f"--mask_values {text}: expected {EXPECTED}")
        ranges.append((low, high))
    return MaskValues(ranges=tuple(ranges))


def check_mask_values(text: str | None) -> None:
    """InputError where the flag is given and means nothing."""
    if text is not None:
        read_mask_values(text)


def _colours_of(image: Image.Image | np.ndarray, values: np.ndarray) -> np.ndarray:
    """[H, W, 3]."""
    if values.ndim == 3:
        return values
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    return np.repeat(values[..., None], 3, axis=-1)


def _near(values: np.ndarray, colours: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Where values [H, W, 3] are one of the colours: exactly, if the image has few."""
    few = len(np.unique(values.reshape(-1, 3), axis=0)) <= FEW_COLOURS
    away = [np.abs(values.astype(float) - colour).max(axis=-1) for colour in colours]
    return np.any([distance <= (0 if few else NEAR) for distance in away], axis=0)
