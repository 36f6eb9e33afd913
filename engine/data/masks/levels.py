"""Which values of a grey mask are the lesion: decided on the values that are there, and on where they lie.

    one value, or 0 and one other              all that is not 0
    dark and bright, edges soft or noisy       brighter than half of the maximum
    labels in separate places, 0 around them   all of them: several lesions
    a thin rim of 255 around other labels      the labels; the rim is what nobody decided on

Everything else can be read in more than one way: labels that touch (an organ and its tumour, a disc and its cup), two labels and no
0, a label beside 255, a lesion that is the dark part. An `UnclearMask` says so, and `--mask_values` decides.
"""

import numpy as np

from engine.errors import InputError

VOID = 255
SMALL_LABELS = 32  # beside labels up to here 255 is no label
FEW_LEVELS = 8  # a mask with noise or soft edges has more
STRAY = 0.02  # values on fewer pixels than this share of the lesion do not matter
SOFT = 0.02  # width of a soft edge, in parts of the image's shorter side, and at least MIN_SOFT pixels
MIN_SOFT = 2
RIM = 5  # pixels: no rim is wider, or than SOFT


class UnclearMask(InputError):
    """A mask that can be read in more than one way; the message is half a line that says which flag decides."""


def find_lesion_pixels(values: np.ndarray) -> np.ndarray:
    """Values [H, W] of a mask, integers or floats -> [H, W] bool. UnclearMask where they can be read in more than one way."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UnclearMask(unclear("some values are not numbers"))
    levels, counts = np.unique(values, return_counts=True)
    if levels[0] < 0:
        raise UnclearMask(unclear(f"there are negative values ({describe(levels, counts)})"))
    if len(levels) == 1:
        return values > 0
    if len(levels) == 2:
        return _not_inverted(_brighter(values, levels, counts), levels, counts)
    if levels[-1] == VOID and _is_rim(values == VOID, (values > 0) & (values < VOID)):
        return find_lesion_pixels(np.where(values == VOID, 0, values))
    top = _brightness(values, levels, solid := solid_levels(values))
    if _is_two_toned(values, levels, solid, top):
        return _not_inverted(values > top / 2, levels, counts)
    if levels[0] == 0 and _are_separate_labels(values, levels):
        return values > 0
    raise UnclearMask(unclear(f"it has {describe(levels, counts)}"))


def describe(levels: np.ndarray, counts: np.ndarray) -> str:
    """`the values 0, 1 and 2`, or how many they are and the most frequent ones."""
    if len(levels) <= 6:
        words = [f"{level:g}" for level in levels]
        return f"the values {', '.join(words[:-1])} and {words[-1]}"
    most = [f"{level:g}" for level in levels[np.argsort(-counts, kind="stable")[:4]]]
    return f"{len(levels)} values, most often {', '.join(most[:-1])} and {most[-1]}"


def unclear(why: str, example: str = "1 or 1,2 or 128-255 or nonzero") -> str:
    return f"{why}, which can be read in more than one way: --mask_values says which are the lesion, e.g. {example}"


def _brighter(values: np.ndarray, levels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The pixels of the higher of two values, if the other is 0 or nearly so."""
    low, high = levels
    if low == 0 or low <= high / 8 and (high >= 128 or high <= 1):
        return values == high
    raise UnclearMask(unclear(f"it has {describe(levels, counts)} and no 0"))


def _not_inverted(lesion: np.ndarray, levels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The lesion; UnclearMask where it is everything around something: then that may be meant."""
    frame = np.concatenate([lesion[0], lesion[-1], lesion[:, 0], lesion[:, -1]])
    if frame.all() and (~lesion).mean() > STRAY / 4:
        found = f"{describe(levels, counts)}, the higher ones all around the lower"
        raise UnclearMask(unclear(f"it has {found}") + " (0 for the dark part)")
    return lesion


def _is_rim(rim: np.ndarray, labels: np.ndarray) -> bool:
    """Whether `rim` is a thin line around what is in `labels` [H, W] bool, which is thicker than it."""
    from scipy import ndimage  # here: it takes a third of a second, which reading flags does not need

    if not labels.any():
        return False
    width, core = (ndimage.distance_transform_cdt(np.pad(part, 1), "chessboard").max() for part in (rim, labels))
    if width > _soft_edge(rim.shape, RIM) / 2 + 1 or core <= width:
        return False
    around = ndimage.binary_dilation(labels, np.ones((3, 3))) & ~labels
    return (around & rim).sum() >= 0.8 * around.sum()


def _soft_edge(shape: tuple[int, ...], least: int) -> int:
    """Pixels that a soft edge may be wide in an image of this shape."""
    return max(least, round(SOFT * min(shape)))


def _is_two_toned(values: np.ndarray, levels: np.ndarray, solid: np.ndarray, top: float) -> bool:
    """Whether the values are a dark and a bright part with soft or noisy edges, so that half of `top` parts them."""
    from scipy import ndimage

    dark, bright, half = values <= 0.25 * top, values > 0.75 * top, values > 0.5 * top
    width, edges = _soft_edge(values.shape, MIN_SOFT), np.ones(values.shape, bool)
    for part, most in ((bright, width), (dark, 2 * width)):
        edges &= ndimage.binary_dilation(part, np.ones((3, 3)), iterations=most)
    if (~dark & (values < 0.9 * top) & ~edges).sum() > STRAY * half.sum():
        return False  # there is something between dark and bright, as in a photograph
    darkest = 0.1 * top if len(levels) >= FEW_LEVELS else 0  # noise has flat parts too, all of them dark
    flat = solid[(solid > darkest) & (solid < 0.9 * top)]
    return bool(np.isin(values, flat).sum() <= STRAY * half.sum())


def _brightness(values: np.ndarray, levels: np.ndarray, solid: np.ndarray) -> float:
    """Of the bright part: its highest solid value, since edges overshoot in JPEG; else the maximum."""
    top = float(solid[-1]) if len(solid) else 0.0
    beyond = (values > 1.25 * top).sum()
    return top if top > 0 and beyond <= STRAY * (values > top / 2).sum() else float(levels[-1])


def solid_levels(values: np.ndarray) -> np.ndarray:
    """The values that fill a square of 3 x 3 pixels somewhere: labels do, the steps of soft edges do not."""
    from scipy import ndimage

    inside = ndimage.maximum_filter(values, 3, mode="nearest") == ndimage.minimum_filter(values, 3, mode="nearest")
    return np.unique(values[inside])


def _are_separate_labels(values: np.ndarray, levels: np.ndarray) -> bool:
    """Whether all values but 0 are labels that nowhere touch, none of them 255 beside small ones."""
    from scipy import ndimage

    if levels[-1] == VOID and levels[1] <= SMALL_LABELS:
        return False
    if not _are_whole(levels):
        return False
    highest = ndimage.maximum_filter(values, 3, mode="nearest")
    lowest = ndimage.minimum_filter(np.where(values == 0, levels[-1], values), 3, mode="nearest")
    touching = (values > 0) & (highest != lowest)
    return not touching.any()


def _are_whole(levels: np.ndarray) -> bool:
    return levels.dtype.kind != "f" or bool((levels == np.round(levels)).all())
