"""Values of any type and depth -> 0-255, as they are shown."""

import numpy as np

BIT_DEPTHS = (8, 10, 12, 14, 16)
OFFSET = 2**14  # values of 16 bits that all lie above it, within the next constant, are signed ones with an offset
OFFSET_SPAN = 2**13


def scale_deep(values: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] values of more than 8 bits -> uint8.

    Integers are scaled from the smallest of 8, 10, 12, 14 and 16 bits that holds their maximum; floats, signed values, larger
    ones, and signed ones that are stored with an offset (DeepLesion: Hounsfield units + 32768, with 0 where nothing was measured)
    from their own minimum and maximum.
    """
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        return to_uint8(values, *((finite.min(), finite.max()) if finite.size else (0, 0)))
    low, high = values.min(), values.max()
    if low < 0 or high >= 2 ** BIT_DEPTHS[-1]:
        return to_uint8(values, low, high)
    if high >= OFFSET:
        measured = values[values > 0].min()
        if measured >= OFFSET and 0 < high - measured <= OFFSET_SPAN:
            return to_uint8(values, measured, high)
    return to_uint8(values, 0, next(2**bits - 1 for bits in BIT_DEPTHS if high < 2**bits))


def to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """low..high -> 0..255, clipped; a constant image is black."""
    low, high = float(low), float(high)
    scaled = (np.nan_to_num(values.astype(np.float64)) - low) * (255 / (high - low) if high != low else 0)
    return np.clip(scaled, 0, 255).round().astype(np.uint8)
