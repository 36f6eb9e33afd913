"""Medical image files as 8-bit RGB: PNG, JPEG, TIFF, BMP and DICOM, recognised by their content rather than by their name.

Grey images of more than 8 bits are scaled to 0-255: integers from the smallest of 8, 10, 12, 14 and 16 bits that holds their
maximum, floats and signed values from their own minimum and maximum. DICOM follows the standard's display pipeline
(PS3.4 N.2): modality rescale, then the VOI table or the first window (without one the frame's own range), then MONOCHROME1
inverted. A multi-frame DICOM gives its middle frame (`frames // 2`), a multi-page TIFF its first page.
"""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from engine.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # what PIL may try: never the formats that start other programs
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM")
EXPECTED = "a whole PNG, JPEG, TIFF, BMP or DICOM file"
MISSING = "no such image file"
BIT_DEPTHS = (8, 10, 12, 14, 16)


class ImageError(InputError):
    """An image that cannot be used. `.reason` is the middle of the message, for callers that name the row instead."""

    reason = ""


def image_error(name: str, reason: str) -> ImageError:
    """`NAME: reason (expected ...)`. Not a constructor, since a data loader's worker passes an error on by its message alone."""
    error = ImageError(f"{name}: {reason} (expected {EXPECTED})")
    error.reason = reason
    return error


def open_image(path: str | Path) -> Image.Image:
    """The image file as PIL RGB. ImageError, naming the file and the reason, if it is missing, truncated or of another kind."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise image_error(str(path), MISSING) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise image_error(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """The bytes of an image file as PIL RGB; `name` is what an ImageError calls it."""
    try:
        if data[128:132] == b"DICM" or Path(name).suffix.lower() in (".dcm", ".dicom"):
            return Image.fromarray(_read_dicom(data))
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return _to_rgb(image)
    except Exception as error:  # decoders raise every kind of exception for damaged or hostile bytes
        raise image_error(name, _reason(error, data)) from None


def _reason(error: Exception, data: bytes) -> str:
    """The decoder's complaint as half a line."""
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "truncated or damaged image: no whole header" if data.startswith(SIGNATURES) else "not an image of a known kind"
    text = (" ".join(str(error).split()) or type(error).__name__)[:160]
    return text if isinstance(error, InputError) else f"truncated or damaged image: {text}"


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any PIL mode; alpha is dropped."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scale_deep(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def _scale_deep(values: np.ndarray) -> np.ndarray:
    """[H, W] grey values of more than 8 bits -> uint8."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 2 ** BIT_DEPTHS[-1]:
        finite = values[np.isfinite(values)]
        return _to_uint8(values, *((finite.min(), finite.max()) if finite.size else (0, 0)))
    return _to_uint8(values, 0, next(2**bits - 1 for bits in BIT_DEPTHS if values.max() < 2**bits))


def _to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """low..high -> 0..255, clipped; a constant image is black."""
    low, high = float(low), float(high)
    scaled = (np.nan_to_num(values.astype(np.float64)) - low) * (255 / (high - low) if high != low else 0)
    return np.clip(scaled, 0, 255).round().astype(np.uint8)


def _read_dicom(data: bytes) -> np.ndarray:
    """DICOM bytes -> [H, W, 3] uint8."""
    from pydicom import dcmread  # imported here: most data sets hold no DICOM
    from pydicom.pixels import apply_color_lut, pixel_array
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    dataset = dcmread(io.BytesIO(data), force=True)  # force: files from before the preamble existed
    if "Rows" not in dataset or "Columns" not in dataset:
        raise InputError("a DICOM file without an image, or not a DICOM file")
    if dataset.Rows * dataset.Columns > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # as PIL has it
        raise InputError(f"{dataset.Rows} x {dataset.Columns} pixels are more than an image may have")
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    frames = int(dataset.get("NumberOfFrames") or 1)
    pixels = pixel_array(dataset, index=frames // 2)
    colours = dataset.PhotometricInterpretation
    if colours == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return _to_uint8(pixels, 0, np.iinfo(pixels.dtype).max)
    if pixels.ndim == 3:
        return _to_uint8(pixels, 0, 2**dataset.BitsStored - 1)  # pixel_array has turned YBR into RGB
    grey = _display_range(pixels, dataset)
    return np.repeat((255 - grey if colours == "MONOCHROME1" else grey)[..., None], 3, axis=-1)


def _display_range(pixels: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Rescale and window of a monochrome frame [H, W] -> uint8, dark = low value."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

    values = apply_modality_lut(pixels, dataset)
    shown = apply_voi_lut(values, dataset)
    if shown is not values:
        if dataset.get("VOILUTSequence"):
            return _to_uint8(shown, shown.min(), shown.max())
        return _to_uint8(shown, *apply_windowing(np.array([-1e30, 1e30]), dataset))  # the window's own ends
    if dataset.BitsStored <= 8 and pixels.dtype.kind == "u" and values is pixels:
        return _to_uint8(values, 0, 2**dataset.BitsStored - 1)
    padding = dataset.get("PixelPaddingValue")
    inside = values[pixels != padding] if padding is not None else values
    inside = inside if inside.size else values
    return _to_uint8(values, inside.min(), inside.max())
