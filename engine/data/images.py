"""Medical image files as 8-bit RGB: PNG, JPEG, TIFF, BMP, WebP, GIF and DICOM, recognised by their content rather than their name;
and slices of volumes, NIfTI or a folder with a DICOM series (`engine.data.volumes.view`).

Images are upright, as every viewer shows them: the orientation in EXIF, XMP or TIFF's tag is applied here and nowhere else. Values
of more than 8 bits are scaled to 0-255 by `engine.data.decoders.scaling`, DICOM is shown by `engine.data.decoders.dicom`. Alpha is
dropped. A multi-frame DICOM gives its middle frame, a multi-page TIFF or GIF its first page.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from engine.data.decoders import tiff
from engine.data.decoders.deep_png import is_deep_png, read_deep_png
from engine.data.decoders.dicom import is_dicom, read_dicom, read_stored
from engine.data.decoders.plain import read_plain
from engine.data.decoders.scaling import scale_deep
from engine.data.volumes.view import View
from engine.errors import InputError
from engine.files import read_bounded

Result = TypeVar("Result")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")  # what PIL may try: never the formats that start other programs
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", *tiff.SIGNATURES, b"BM", b"RIFF", b"GIF8")
EXPECTED = "a whole PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM file"
MISSING = "no such image file"
MAX_BYTES = 2**30  # of a file: more is no image that fits the pixels PIL allows
ORIENTATION = 274  # the tag, in TIFF as in EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(InputError):
    """An image that cannot be used. `.reason` is the middle of the message, for callers that name the row instead."""

    reason = ""
    expected = EXPECTED


def image_error(name: str, reason: str, expected: str = EXPECTED) -> ImageError:
    """`NAME: reason (expected ...)`. Not a constructor, since a data loader's worker passes an error on by its message alone."""
    error = ImageError(f"{name}: {reason} (expected {expected})")
    error.reason, error.expected = reason, expected
    return error


def open_image(path: str | Path) -> Image.Image:
    """The image file, or the slice of a volume, as PIL RGB. ImageError, naming file and reason, where it cannot be used."""
    view = View.of(path)
    return open_view(view) if view.is_of_volume else decode_image(read_image_file(path), str(path))


def open_slices(path: str | Path, index: str | None, window: str | None) -> list[Image.Image]:
    """`open_image`, with what --slice (a number from 0, or all) and --window say: one image, or all slices."""
    view = View.of(path)
    view = replace(view, slice=index or view.slice, window=window or view.window)
    if index != "all":
        return [open_view(view) if view.is_of_volume else open_image(path)]
    return _volume_errors(view, view.open_all)


def open_view(view: View) -> Image.Image:
    """A slice of a volume as PIL RGB; errors as `open_image`."""
    return _volume_errors(view, view.open)


def _volume_errors(view: View, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except InputError as error:
        reason = str(error).removeprefix(f"{view.file}: ")
        raise image_error(str(view.file), reason, "a slice of a DICOM or NIfTI volume") from None


def read_image_file(path: str | Path) -> bytes:
    """The content of the file. ImageError if there is none, or what is there is no file or far too large."""
    try:
        return read_bounded(path, MAX_BYTES)
    except FileNotFoundError:
        raise image_error(str(path), MISSING) from None
    except OSError as error:
        raise image_error(str(path), f"cannot be read: {error.strerror or error}") from None


def decode_image(data: bytes, name: str) -> Image.Image:
    """The bytes of an image file as PIL RGB; `name` is what an ImageError calls it."""
    found = _decode(data, name)
    return Image.fromarray(found) if isinstance(found, np.ndarray) else found


def decode_pixels(data: bytes, name: str) -> np.ndarray:
    """The same as uint8 [H, W, 3], for which most files need no PIL image."""
    return np.asarray(_decode(data, name))


def _decode(data: bytes, name: str) -> Image.Image | np.ndarray:
    try:
        if is_dicom(data, Path(name).suffix):
            return Image.fromarray(read_dicom(data))
        pixels = read_plain(data)
        return pixels if pixels is not None else _to_rgb(_with_pixels(_read_upright(data)))
    except Exception as error:  # decoders raise every kind of exception for damaged or hostile bytes
        raise image_error(name, _reason(error, data)) from None


def decode_stored(data: bytes, name: str) -> Image.Image | np.ndarray:
    """The bytes of an image file with its values as they are stored, upright; errors as `decode_image`.

    An 8-bit image is a PIL image of its own mode, with its palette; one of more bits, and a DICOM, an array [H, W] or [H, W, C]
    (C: 2 grey and alpha, 3 RGB, 4 RGB and alpha).
    """
    try:
        image = read_stored(data) if is_dicom(data, Path(name).suffix) else _read_upright(data)
        return _with_pixels(image)
    except Exception as error:
        raise image_error(name, _reason(error, data)) from None


def count_pages(data: bytes) -> int:
    """Pages of a TIFF of the first one's size, frames of a GIF, WebP or PNG; 1 of other files."""
    try:
        if data.startswith(tiff.SIGNATURES):
            return tiff.count_pages(data)
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "GIF")) as image:
            return getattr(image, "n_frames", 1)
    except Exception:  # damaged, or another kind
        return 1


def is_turned(data: bytes) -> bool:
    """Whether the file says that its rows and columns are not as they are to be shown."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format == "PNG":
                image.load()  # what a PNG says of itself may stand after its pixels
            return _orientation(image) in TURNS
    except Exception:
        return False


def write_upright(image: Path, copy: Path) -> None:
    """Copy an image file: as it is, or, where it says that it is turned, upright and without that word (JPEG at full quality)."""
    data = read_image_file(image)
    if not is_turned(data):
        copy.write_bytes(data)
    elif copy.suffix.lower() in (".jpg", ".jpeg"):
        decode_image(data, str(image)).save(copy, "JPEG", quality=100, subsampling=0)
    else:
        decode_image(data, str(image)).save(copy, "PNG")


def _read_upright(data: bytes) -> Image.Image | np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if data.startswith(tiff.SIGNATURES):
            return _read_tiff(data)
        raise
    with image:
        if image.format == "TIFF" and not tiff.pil_reads(image.tag_v2):  # type: ignore[attr-defined]
            return _read_tiff(data)
        image.load()
        if is_deep_png(data):
            return tiff.turn_upright(read_deep_png(data), _orientation(image))
        turn = TURNS.get(_orientation(image))  # of a TIFF none: PIL has turned it
        upright = image.copy() if turn is None else image.transpose(turn)
        return np.asarray(upright) if upright.mode.startswith(("I", "F")) else upright


def _with_pixels(image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    if 0 in (image.shape if isinstance(image, np.ndarray) else image.size):
        raise InputError("an image without pixels")
    return image


def _read_tiff(data: bytes) -> Image.Image | np.ndarray:
    values = tiff.read_tiff(data)
    return Image.fromarray(values) if values.dtype == np.uint8 else values


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where the file says nothing, or nothing that can be read: its pixels may be whole nevertheless."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def _reason(error: Exception, data: bytes) -> str:
    """The decoder's complaint as half a line."""
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "truncated or damaged image: no whole header" if data.startswith(SIGNATURES) else "not an image of a known kind"
    text = (" ".join(str(error).split()) or type(error).__name__)[:160]
    return text if isinstance(error, InputError) else f"truncated or damaged image: {text}"


def _to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """8-bit RGB of any PIL mode and of deep values; alpha is dropped."""
    if isinstance(image, np.ndarray):
        channels = 0 if image.ndim == 2 else image.shape[-1]
        colours = image[..., 0] if channels == 2 else image[..., :3] if channels else image
        return Image.fromarray(scale_deep(colours)).convert("RGB")
    return image.convert("RGB")
