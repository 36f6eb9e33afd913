"""Values as they are kept, and as they are shown: rescaled once, then windowed to 0-255."""

import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.data.decoders.scaling import to_uint8
from engine.data.volumes.volume import Volume
from engine.errors import InputError

WINDOW_HELP = "What is shown of the values: a centre and a width (CT: 40,400), auto (their own range), or dicom (as the file says)."
TAILS = (0.5, 99.5)  # percentiles of what is not the lowest value that `auto` shows
SAMPLED = 4_000_000  # voxels that percentiles are taken of


class Window(NamedTuple):
    """Values from `low` to `high` are shown as 0 to 255."""

    low: float
    high: float


def read_window(text: str | None) -> str | Window:
    """`--window`: `dicom` (also None), `auto`, or `C,W` as DICOM's linear function has it (PS3.3 C.11.2.1.2). InputError."""
    if text in (None, "dicom", "auto"):
        return text or "dicom"
    numbers = re.fullmatch(r"\s*(-?\d+\.?\d*)\s*,\s*(\d+\.?\d*)\s*", text or "")
    if numbers is None or float(numbers[2]) < 1:
        raise InputError(f"--window {text}: expected a centre and a width of at least 1, as 40,400, or auto or dicom")
    centre, width = float(numbers[1]), float(numbers[2])
    low = centre - 0.5 - (width - 1) / 2
    return Window(low, low + max(width - 1, 1e-6))


class Pictures:
    """Slices of a volume as RGB. `dicom` is as `auto` where the file says nothing of how it is to be shown."""

    def __init__(self, volume: Volume, window: str | Window = "dicom"):
        self.volume, self.window = volume, window
        self._auto: Window | None = None

    def __call__(self, index: int) -> Image.Image:
        values = self.volume.voxels[index]
        if self.volume.is_colour:
            return Image.fromarray(np.ascontiguousarray(values))
        grey = self.volume.source.shown(values, index) if self.window == "dicom" else None
        if grey is None:
            window = self.window if isinstance(self.window, Window) else self._range()
            grey = to_uint8(values, *window)
            grey = 255 - grey if self.volume.source.inverted else grey
        return Image.fromarray(np.repeat(grey[..., None], 3, axis=-1))

    def _range(self) -> Window:
        if self._auto is None:
            self._auto = auto_window(self.volume.voxels)
        return self._auto


def auto_window(voxels: np.ndarray) -> Window:
    """From percentile to percentile of the finite values above the lowest one, which is background or padding."""
    sample = voxels.reshape(-1)[:: max(1, voxels.size // SAMPLED)]
    sample = sample[np.isfinite(sample)] if sample.dtype.kind == "f" else sample
    inside = sample[sample > sample.min()] if sample.size else sample
    if not inside.size:
        return Window(0.0, 1.0)
    low, high = (float(edge) for edge in np.percentile(inside, TAILS))
    return Window(low, high) if high > low else Window(float(sample.min()), low)  # two values, as a mask has them


def kept(values: np.ndarray) -> np.ndarray:
    """The same values in the smallest of uint8, int16, uint16 and int32 that holds them; float32 where they are no integers."""
    if values.dtype in (np.uint8, np.int16, np.uint16, np.int32):
        return values
    if values.dtype.kind == "f":
        whole = bool(np.isfinite(values).all() and (values == np.round(values)).all())
        if not whole:
            return values.astype(np.float32)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    for kind in (np.int16, np.uint16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.float32)
