"""DICOM files as the standard's display pipeline shows them (PS3.4 N.2), and their stored values.

Modality rescale, then the VOI table or the first window (without one the frame's own range), then MONOCHROME1 inverted. Of
several frames it is the middle one, `frames // 2`. Enhanced files say rescale and window in functional groups, of the frame or
shared by all (PS3.3 C.7.6.16), which go before what the data set itself says.
"""

import io
import logging
import math
import os
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from engine.data.decoders.plain import jpeg_markers
from engine.data.decoders.scaling import to_uint8
from engine.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"  # the storage class
GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")  # rescale; window or table
DISPLAY = (
    "PhotometricInterpretation BitsAllocated BitsStored PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit Modality "
    "RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter WindowWidth VOILUTFunction VOILUTSequence"
).split()
DEFLATED, MAX_INFLATED = b"1.2.840.10008.1.2.1.99", 2**28  # the transfer syntax; bytes, which pydicom inflates all at once
GDCMS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")  # transfer syntaxes
ELSEWHERE = ("JPEG2000", "JPEG2000Lossless", "JPEGBaseline8Bit", "JPEGLSLossless", "JPEGLSNearLossless")  # Pillow, CharLS: the same
LINEAR = "LINEAR"
ALLOW_BURNED_IN = "VESALIUS_ALLOW_BURNED_IN"


def is_dicom(data: bytes, suffix: str) -> bool:
    """By the preamble; files from before there was one by their ending."""
    return data[128:132] == b"DICM" or suffix.lower() in (".dcm", ".dicom")


def read_dicom(data: bytes) -> np.ndarray:
    """[H, W, 3] uint8, as shown. Raises all kinds of exceptions for damaged bytes, InputError for a file without an image."""
    from pydicom.pixels import apply_modality_lut

    dataset, pixels = _read_frame(data)
    if pixels.ndim == 3:
        return pixels
    display = display_of(dataset, middle_frame(dataset))
    values = apply_modality_lut(pixels, display)
    padding = display.get("PixelPaddingValue")
    inside = values[pixels != padding] if padding is not None else values
    grey = show_values(values, display, inside if inside.size else values, as_stored=values is pixels)
    return np.repeat(grey[..., None], 3, axis=-1)


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


def open_dataset(data: bytes) -> "Dataset":
    """The data set of a file with an image. InputError where it has none, is far too large, or shows who the patient is."""
    from pydicom import dcmread  # imported here: most data sets hold no DICOM
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    say_no_values()
    check_inflated(data)
    dataset = dcmread(io.BytesIO(data), force=True)  # force: files from before the preamble existed
    if "Rows" not in dataset or "Columns" not in dataset:
        raise InputError("a DICOM file without an image, or not a DICOM file")
    if dataset.Rows * dataset.Columns > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # as PIL has it
        raise InputError(f"{dataset.Rows} x {dataset.Columns} pixels are more than an image may have")
    if "YES" in str(dataset.get("BurnedInAnnotation")).upper() and not burned_in_allowed():
        raise InputError(
            f"its pixels show the patient's name: BurnedInAnnotation is YES (--allow_burned_in, or {ALLOW_BURNED_IN}=1)"
        )
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def decoded(dataset: "Dataset", frame: int | None = None) -> np.ndarray:
    """What pydicom makes of a frame, or of all.

    gdcm, in which damaged bytes can end the process, only decodes lossless JPEG, whose start is looked at first.
    """
    from pydicom.encaps import generate_frames
    from pydicom.pixels import decoders, pixel_array

    if dataset.file_meta.TransferSyntaxUID in GDCMS:
        for part in generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1)):
            list(jpeg_markers(part))
    for name in ELSEWHERE:
        if {"gdcm"} < set((decoder := getattr(decoders, f"{name}Decoder")).available_plugins):
            decoder.remove_plugin("gdcm")
    return np.asarray(pixel_array(dataset, index=frame))


def check_inflated(data: bytes) -> None:
    """InputError for a deflated data set that pydicom would inflate beyond all bounds."""
    start = 144 + int.from_bytes(data[140:144], "little")  # behind the group of what is said about the file, by that group's length
    if DEFLATED not in data[132:start]:
        return
    inflater, part, inflated = zlib.decompressobj(-zlib.MAX_WBITS), data[start:], 0
    while part and inflated <= MAX_INFLATED and not inflater.eof:
        inflated += len(inflater.decompress(part, 2**20))
        part = inflater.unconsumed_tail
    if inflated > MAX_INFLATED:
        raise InputError(f"it inflates to more than {MAX_INFLATED:,} bytes")


def say_no_values() -> None:
    """pydicom's warnings about a file hold values of its tags, which may be the patient's."""
    from pydicom import config

    config.settings.reading_validation_mode = config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pydicom")


def burned_in_allowed() -> bool:
    """Whether `--allow_burned_in` was given, to this process or the one that started it."""
    return os.environ.get(ALLOW_BURNED_IN, "") not in ("", "0")


def as_colours(dataset: "Dataset", pixels: np.ndarray) -> np.ndarray | None:
    """What pydicom decoded [..., H, W] or [..., H, W, 3] -> [..., H, W, 3] uint8 of a file in colour; None of a grey one."""
    from pydicom.pixels import apply_color_lut

    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return to_uint8(pixels, 0, np.iinfo(pixels.dtype).max)
    if dataset.get("SamplesPerPixel", 1) == 3:
        return to_uint8(pixels, 0, 2**dataset.BitsStored - 1)  # pydicom has turned YBR into RGB
    return None


def display_of(dataset: "Dataset", frame: int) -> "Dataset":
    """What a data set says of how a frame is to be shown, its functional groups and those of all frames included."""
    from pydicom import Dataset

    display = Dataset()
    for name in DISPLAY:
        if name in dataset:
            display[name] = dataset[name]
    for group in groups_of(dataset, frame):
        for name in GROUPS:
            for item in list(group.get(name) or [])[:1]:
                display.update({element.tag: element for element in item})
    widths, least = np.ravel(display.get("WindowWidth", [])), 1 if display.get("VOILUTFunction", LINEAR) == LINEAR else 1e-9
    if widths.size and widths.dtype.kind == "f" and not widths[0] >= least:
        del display["WindowWidth"]  # of an empty slice: it says nothing
    return display


def groups_of(dataset: "Dataset", frame: int) -> "list[Dataset]":
    """The functional groups of a frame: those it shares, then its own, which win."""
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    return [*shared, *list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]]


def show_values(values: np.ndarray, display: "Dataset", inside: np.ndarray, *, as_stored: bool) -> np.ndarray:
    """Values after the modality rescale [H, W] -> uint8, bright = shown bright.

    `inside`: those that count where neither table nor window says what is shown; `as_stored`: that there was no rescale.
    """
    from pydicom.pixels import apply_voi_lut, apply_windowing

    shown = apply_voi_lut(values, display)
    if shown is not values:
        table = display.get("VOILUTSequence")
        ends = (shown.min(), shown.max()) if table else apply_windowing(np.array([-1e30, 1e30]), display)  # the window's own
        grey = to_uint8(shown, *ends)
    elif display.BitsStored <= 8 and values.dtype.kind == "u" and as_stored:
        grey = to_uint8(values, 0, 2**display.BitsStored - 1)
    else:
        grey = to_uint8(values, inside.min(), inside.max())
    return 255 - grey if display.PhotometricInterpretation == "MONOCHROME1" else grey


def _read_frame(data: bytes) -> tuple["Dataset", np.ndarray]:
    """(the data set, its middle frame: [H, W] as stored or [H, W, 3] uint8)."""
    dataset = open_dataset(data)
    pixels = decoded(dataset, middle_frame(dataset))
    colours = as_colours(dataset, pixels)
    return dataset, pixels if colours is None else colours


def middle_frame(dataset: "Dataset") -> int:
    return int(dataset.get("NumberOfFrames") or 1) // 2
