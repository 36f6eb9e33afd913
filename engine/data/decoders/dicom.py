"""DICOM files as the standard's display pipeline shows them (PS3.4 N.2), and their stored values.

Modality rescale, then the VOI table or the first window (without one the frame's own range), then MONOCHROME1 inverted. Of
several frames it is the middle one, `frames // 2`. Enhanced files say rescale and window in functional groups, of the frame or
shared by all (PS3.3 C.7.6.16), which go before what the data set itself says.
"""

import io
import math
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from engine.data.decoders.scaling import to_uint8
from engine.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

DEFLATED, META = b"1.2.840.10008.1.2.1.99", 1024  # a transfer syntax, which stands among the first bytes
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"  # the storage class
GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")  # rescale; window or table


def is_dicom(data: bytes, suffix: str) -> bool:
    """By the preamble; files from before there was one by their ending."""
    return data[128:132] == b"DICM" or suffix.lower() in (".dcm", ".dicom")


def read_dicom(data: bytes) -> np.ndarray:
    """[H, W, 3] uint8, as shown. Raises all kinds of exceptions for damaged bytes, InputError for a file without an image."""
    dataset, pixels = _read_frame(data)
    if pixels.ndim == 3:
        return pixels
    grey = _display_range(pixels, dataset)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    return np.repeat((255 - grey if inverted else grey)[..., None], 3, axis=-1)


def read_stored(data: bytes) -> np.ndarray:
    """[H, W] values as they are stored, MONOCHROME1 turned so that 0 is black; [H, W, 3] uint8 of a file in colour.

    InputError for a segmentation of several frames: these are different lesions or slices, of which one would be left.
    """
    dataset, pixels = _read_frame(data)
    if dataset.get("SOPClassUID") == SEGMENTATION and int(dataset.get("NumberOfFrames") or 1) > 1:
        raise InputError(
            f"a DICOM segmentation of {dataset.NumberOfFrames} frames, where one is read: save each as a mask of its own"
        )
    if pixels.ndim == 2 and dataset.PhotometricInterpretation == "MONOCHROME1":
        return pixels.max() - pixels.astype(np.int64)
    return pixels


def _read_frame(data: bytes) -> tuple["Dataset", np.ndarray]:
    """(the data set as it holds for the middle frame, that frame: [H, W] as stored or [H, W, 3] uint8)."""
    from pydicom import dcmread  # imported here: most data sets hold no DICOM
    from pydicom.pixels import apply_color_lut, pixel_array
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if DEFLATED in data[:META]:
        _refuse_bomb(data)
    dataset = dcmread(io.BytesIO(data), force=True)  # force: files from before the preamble existed
    if "Rows" not in dataset or "Columns" not in dataset:
        raise InputError("a DICOM file without an image, or not a DICOM file")
    if dataset.Rows * dataset.Columns > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # as PIL has it
        raise InputError(f"{dataset.Rows} x {dataset.Columns} pixels are more than an image may have")
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    frame = int(dataset.get("NumberOfFrames") or 1) // 2
    pixels = pixel_array(dataset, index=frame)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return dataset, to_uint8(pixels, 0, np.iinfo(pixels.dtype).max)
    if pixels.ndim == 3:
        return dataset, to_uint8(pixels, 0, 2**dataset.BitsStored - 1)  # pixel_array has turned YBR into RGB
    _apply_groups(dataset, frame)
    return dataset, pixels


def _refuse_bomb(data: bytes) -> None:
    """InputError for a deflated file that is too large when it is inflated, which pydicom would do at once and without a limit."""
    most, inflated = 4 * (Image.MAX_IMAGE_PIXELS or math.inf), 0
    begin = 144 + int.from_bytes(data[140:144], "little")  # after the preamble and the file's meta group, whose length it has
    stream, rest = zlib.decompressobj(-zlib.MAX_WBITS), data[begin:]
    while rest and not stream.eof and inflated <= most:
        inflated += len(stream.decompress(rest, 1 << 20))
        rest = stream.unconsumed_tail
    if inflated > most:
        raise InputError(f"a deflated DICOM file of more than {most:,} bytes, which is more than an image may have")


def _apply_groups(dataset: "Dataset", frame: int) -> None:
    """Put what the functional groups say of this frame where the display pipeline looks for it."""
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    own = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in (*shared, *own):  # the frame's own last: they win
        for name in GROUPS:
            for item in list(group.get(name) or [])[:1]:
                dataset.update({element.tag: element for element in item})


def _display_range(pixels: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Rescale and window of a monochrome frame [H, W] -> uint8, dark = low value."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

    values = apply_modality_lut(pixels, dataset)
    shown = apply_voi_lut(values, dataset)
    if shown is not values:
        if dataset.get("VOILUTSequence"):
            return to_uint8(shown, shown.min(), shown.max())
        return to_uint8(shown, *apply_windowing(np.array([-1e30, 1e30]), dataset))  # the window's own ends
    if dataset.BitsStored <= 8 and pixels.dtype.kind == "u" and values is pixels:
        return to_uint8(values, 0, 2**dataset.BitsStored - 1)
    padding = dataset.get("PixelPaddingValue")
    inside = values[pixels != padding] if padding is not None else values
    inside = inside if inside.size else values
    return to_uint8(values, inside.min(), inside.max())
