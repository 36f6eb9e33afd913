"""What a network reads of an image, as numbers: for whoever makes it elsewhere than the model's processor does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Colour = Sequence[float]  # of three channels


@dataclass(frozen=True)
class View:
    """An image of 8-bit RGB is squared, resized, normalised, and cut into patches or laid in a square of zeros.

    resized(height, width): what it is resized to, from its own size;  bicubic or else bilinear, both antialiased as Pillow's
    mean, std: of each channel, in 0-1        fill: it lies in the middle of a square of this colour (0-255) first
    side: [3, side, side], zeros to the right of it and below       patch: (side of a patch, of a square of patches, moments), as
    Qwen-VL's patches [n, 3 * moments * side * side]
    """

    resized: Callable[[int, int], tuple[int, int]]
    mean: Colour
    std: Colour
    bicubic: bool = True
    fill: Sequence[int] | None = None
    side: int | None = None
    patch: tuple[int, int, int] | None = None
