"""Mask files of any kind as grey levels or labels [H, W], 0 for the background, of which `levels` finds the lesion.

grey                           its values; also where it is stored as RGB, or by a palette of greys
palette with black at index 0  the indices; a palette that has one colour twice is none, and its indices are the labels
a few colours                  labels, black being the background, white and PASCAL VOC's (224, 224, 192) label 255
colours with noise, as JPEG    the brightest channel, if no two colours touch
alpha                          the mask where all colours are one; elsewhere transparent pixels are background
"""

import numpy as np
from PIL import Image

from engine.data.masks.levels import STRAY, VOID, UnclearMask, find_lesion_pixels, solid_levels, unclear

FEW_COLOURS = 64
GREY = 0.1  # of the brightest: channels that differ by less are one grey with noise
VOID_COLOURS = ((255, 255, 255), (224, 224, 192))
ONE_READING = 0.98  # Dice of two readings that are one


def find_lesion(image: Image.Image | np.ndarray) -> np.ndarray:
    """A mask's stored values (see `engine.data.images.decode_stored`) -> [H, W] bool. UnclearMask where that cannot be told."""
    values, alpha = split_alpha(image)
    if alpha is None or alpha.min() == alpha.max():
        return find_lesion_pixels(as_levels(values))
    colours = values.reshape(-1, *values.shape[2:])
    if (colours == colours[0]).all():
        return find_lesion_pixels(alpha)
    shown = np.where(alpha > 0 if values.ndim == 2 else alpha[..., None] > 0, values, 0)
    readings = [find_lesion_pixels(as_levels(shown))]
    try:
        readings.append(find_lesion_pixels(as_levels(values)))
    except UnclearMask:
        return readings[0]
    both, total = (readings[0] & readings[1]).sum(), readings[0].sum() + readings[1].sum()
    if 2 * both < ONE_READING * total:
        raise UnclearMask(unclear("its alpha channel and its colours show different lesions", "alpha or nonzero"))
    return readings[0]


def split_alpha(image: Image.Image | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(values [H, W] or [H, W, 3], alpha [H, W] or None). A palette's values are its indices where these are the labels."""
    if isinstance(image, np.ndarray):
        if image.ndim == 2 or image.shape[-1] == 3:
            return image, None
        return image[..., 0] if image.shape[-1] == 2 else image[..., :3], image[..., -1]
    if image.mode == "P" and "transparency" not in image.info:
        return palette_values(image), None
    if image.mode in ("P", "PA", "RGBA", "RGBa", "LA", "La"):
        pixels = np.asarray(image.convert("RGBA"))
        return pixels[..., :3], pixels[..., 3]
    if image.mode in ("1", "L"):
        return np.asarray(image).astype(np.uint8), None
    return np.asarray(image.convert("RGB")), None


def palette_values(image: Image.Image) -> np.ndarray:
    """Indices [H, W], or colours [H, W, 3] where the palette says more: greys, or no black at index 0."""
    indices = np.asarray(image)
    used = np.unique(indices)
    palette = np.zeros((256, 3), np.uint8)
    entries = np.asarray(image.getpalette("RGB") or [], np.uint8)[: 256 * 3].reshape(-1, 3)
    palette[: len(entries)] = entries
    colours = palette[used]
    if len(np.unique(colours, axis=0)) < len(used):
        return indices
    greys = (colours == colours[:, :1]).all()
    black = used[~colours.any(axis=1)]
    return palette[indices] if greys or len(used) > FEW_COLOURS or len(black) and black[0] != 0 else indices


def as_levels(values: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, 3] -> [H, W] levels or labels. UnclearMask where colours leave open which is the background."""
    if values.ndim == 2:
        return values
    if is_grey(values):
        first = values[..., 0]
        return first if (values == first[..., None]).all() else values.mean(axis=-1).round()
    colours, labels = np.unique(values.reshape(-1, 3), axis=0, return_inverse=True)
    labels = labels.reshape(values.shape[:2]) + 1
    if len(colours) <= FEW_COLOURS:
        solid = solid_levels(labels)
        stray = ~np.isin(labels, solid) & values.any(axis=-1)
        if stray.sum() <= STRAY * values.any(axis=-1).sum():
            return _numbered(colours, labels)
    return _brightest(values)


def is_grey(values: np.ndarray) -> bool:
    """Whether the channels [H, W, 3] are one but for noise."""
    lowest, highest = values.min(axis=-1).astype(float), values.max(axis=-1).astype(float)
    return bool((highest - lowest).max() <= GREY * highest.max()) if np.isfinite(highest).all() else False


def _numbered(colours: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels of colours [N, 3], from 1, with black as 0 and white as 255."""
    black = ~colours.any(axis=1)
    if not black.any():
        raise UnclearMask(unclear(f"it has the colours {describe_colours(colours)} and no black", "255/0/0"))
    void = [tuple(colour) in VOID_COLOURS for colour in colours.tolist()]
    numbers = np.where(black, 0, np.where(void, VOID, np.arange(1, len(colours) + 1)))
    numbered = numbers[labels - 1]
    try:
        find_lesion_pixels(numbered)
    except UnclearMask:
        raise UnclearMask(unclear(f"it has the colours {describe_colours(colours)}", "255/0/0 or 255/0/0,0/255/0")) from None
    return numbered


def describe_colours(colours: np.ndarray) -> str:
    """[N, 3] -> `0/0/0, 255/0/0 and 0/255/0`, at most five of them."""
    words = ["/".join(f"{channel:g}" for channel in colour) for colour in colours.tolist()]
    return ", ".join(words[:5]) + " and more" if len(words) > 5 else f"{', '.join(words[:-1])} and {words[-1]}"


def _brightest(values: np.ndarray) -> np.ndarray:
    """The brightest channel of colours with noise [H, W, 3]. UnclearMask where two colours touch, or there is no ground."""
    from scipy import ndimage  # here: it takes a third of a second, which reading flags does not need

    brightest = values.max(axis=-1)
    if (brightest <= brightest.max() / 4).sum() <= STRAY * brightest.size:
        raise UnclearMask(unclear("it has many colours and hardly any black", "255/0/0"))
    strong = values > brightest.max() / 2
    codes = strong @ np.array([4, 2, 1])  # which channels are bright: 0 to 7
    found = [code for code in solid_levels(codes) if code]
    grown = [ndimage.binary_dilation(codes == code, np.ones((3, 3)), iterations=2) & (codes > 0) for code in found]
    overlap = np.sum([part.astype(np.uint8) for part in grown], axis=0) > 1 if grown else np.zeros(1, bool)
    if overlap.sum() > STRAY * (codes > 0).sum():
        raise UnclearMask(unclear("it has many colours, of which some touch", "255/0/0"))
    return brightest
