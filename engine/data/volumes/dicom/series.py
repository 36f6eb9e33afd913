"""DICOM as volumes: a folder with a series, a multi-frame file, a single image. What is said about the patient is never shown.

Values are those after the modality's rescale (CT: Hounsfield units); padding counts as the lowest value measured in its slice. The
slices of a file without places, such as an ultrasound clip, are its frames as they come.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.data.decoders.dicom import (
    DEFLATED,
    as_colours,
    check_inflated,
    decoded,
    display_of,
    is_dicom,
    open_dataset,
    say_no_values,
    show_values,
)
from engine.data.volumes.dicom.geometry import Place, place_of, stack
from engine.data.volumes.values import kept
from engine.data.volumes.volume import MAX_VOXELS, Volume
from engine.errors import InputError
from engine.files import open_regular, read_bounded, visible_files
from engine.progress import progress

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_BYTES = 2**31  # of one file
MAX_FILES = 100_000  # of a folder
OTHER_CLASSES = (  # what lies beside images in a study's folder
    "1.2.840.10008.5.1.4.1.1.66.4",  # segmentation
    "1.2.840.10008.5.1.4.1.1.66.7",  # label map segmentation
    "1.2.840.10008.5.1.4.1.1.66.1",  # registration
    "1.2.840.10008.5.1.4.1.1.481.2",  # dose
)


@dataclass(frozen=True)
class DicomSource:
    """The instances that a volume was read from, without their pixels."""

    instances: "list[Dataset]"  # in the order of the slices; one of a multi-frame file
    frames: list[int]  # of each slice, in its instance
    displays: "list[Dataset]"  # of each slice

    @property
    def inverted(self) -> bool:
        return bool(self.displays[0].PhotometricInterpretation == "MONOCHROME1")

    def shown(self, values: np.ndarray, index: int) -> np.ndarray | None:
        """By the slice's own table or window; None where it has neither, unless it is of 8 bits and shown as it is."""
        display = self.displays[index]
        windowed = "VOILUTSequence" in display or "WindowCenter" in display and "WindowWidth" in display
        if not windowed and values.dtype != np.uint8:
            return None
        try:
            return show_values(values, display, values, as_stored=True)
        except Exception:  # pydicom has many kinds for damaged ones
            raise InputError(f"slice {index}: its window or table is damaged (expected --window C,W or auto)") from None


def read_dicom_file(path: Path) -> Volume:
    """A single image or a multi-frame file. InputError of one line where it is neither, damaged or no stack of slices."""
    return _read([path], str(path))


def read_series(folder: Path, series: str | None = None) -> Volume:
    """The series in a folder, or in folders within it; of several the one that `series` names: its number from 1, or its UID.

    InputError of one line where there is none, several and none named, or its files are no stack of slices.
    """
    found = find_series(folder)
    if not found:
        raise InputError(f"{folder}: no DICOM images in this folder")
    listed = sorted(found.items(), key=lambda item: (item[1].number, item[0]))
    if series is None and len(listed) > 1:
        words = "; ".join(f"{at}: {entry}" for at, (_, entry) in enumerate(listed[:8], 1)) + ("; ..." if len(listed) > 8 else "")
        raise InputError(f"{folder}: holds {len(listed)} series, expected one, or --series 1 to {len(listed)} ({words})")
    chosen = listed[0][1] if series is None else found.get(series)
    if chosen is None and series is not None and series.isdecimal() and len(series) < 10 and 1 <= int(series) <= len(listed):
        chosen = listed[int(series) - 1][1]
    if chosen is None:
        expected = f"expected a number from 1 to {len(listed)}, or a UID"
        raise InputError(f"--series {series}: {folder} holds {len(listed)} series ({expected})")
    return _read(chosen.files, str(folder))


@dataclass
class Series:
    """Files of one series."""

    number: int
    modality: str
    size: tuple[int, int]
    files: list[Path]

    def __str__(self) -> str:
        return f"{self.modality} {self.size[0]} x {self.size[1]}, {len(self.files)} file{'s' * (len(self.files) > 1)}"


def find_series(folder: Path) -> dict[str, Series]:
    """{SeriesInstanceUID: its files} of the images under a folder; files of other kinds are passed over."""
    found: dict[str, Series] = {}
    files = visible_files(folder, "**/*")
    if len(files) > MAX_FILES:
        raise InputError(f"{folder}: {len(files):,} files (expected a series of at most {MAX_FILES:,})")
    for path in progress(files, desc="looking for series", unit="file", delay=2):
        try:
            named = _series_of(path)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # damaged in any way: one of the series may be missing
            raise InputError(f"{path}: damaged DICOM: {' '.join(str(error).split())[:160]}") from None
        if named is not None:
            found.setdefault(named[0], named[1]).files.append(path)
    return found


def _series_of(path: Path) -> tuple[str, Series] | None:
    """(SeriesInstanceUID, the series without a file) of an image; None of any other file."""
    from pydicom import dcmread
    from pydicom.uid import UID

    say_no_values()
    with open_regular(path) as file:
        head = file.read(2048)
        if not is_dicom(head, path.suffix):
            return None
        if DEFLATED in head:
            check_inflated(read_bounded(path, MAX_BYTES))
        file.seek(0)
        tags = ["SeriesInstanceUID", "SeriesNumber", "Modality", "Rows", "Columns", "SOPClassUID"]
        header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
    if "Rows" not in header and "Image Storage" in UID(header.get("SOPClassUID", "")).name:
        raise InputError("damaged DICOM: it ends before its image")
    if "Rows" not in header or "Columns" not in header or header.get("SOPClassUID") in OTHER_CLASSES:
        return None
    modality = str(header.get("Modality") or "")
    size = (int(header.Rows), int(header.Columns))
    series = Series(int(header.get("SeriesNumber") or 0), modality if modality.isalnum() else "image", size, [])
    return str(header.get("SeriesInstanceUID", "")), series


def _read(files: list[Path], name: str) -> Volume:
    """`name` is what errors call the whole."""
    instances: list[Dataset] = []
    places: list[Place] = []
    owners: list[tuple[int, int]] = []  # instance and frame of each
    parts: dict[tuple[int, int], np.ndarray] = {}
    voxels = 0
    for path in progress(files, desc="reading slices", unit="file", delay=2, disable=len(files) == 1):
        dataset, pixels, its_places = _read_instance(path, voxels)
        if len(files) > 1 and len(pixels) > 1:
            raise InputError(f"{name}: a series of several multi-frame files (expected one file, or one image in each)")
        voxels += pixels.size
        places += its_places
        for frame in range(len(pixels)):
            owners.append((len(instances), frame))
            parts[owners[-1]] = pixels[frame]
        instances.append(dataset)
    try:
        order, affine, placed = stack(places)
        if not placed and len(instances) > 1:
            raise InputError("images without a place in the patient, whose order nothing says")
        if len({part.ndim for part in parts.values()}) > 1:
            raise InputError("grey and coloured slices")
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    chosen = [owners[index] for index in order]
    joined = kept(np.stack([parts.pop(owner) for owner in chosen]))
    displays = [display_of(instances[instance], frame) for instance, frame in chosen]
    ordered = instances if len(instances) == 1 else [instances[instance] for instance, _ in chosen]
    return Volume(joined, affine, DicomSource(ordered, [frame for _, frame in chosen], displays), placed)


def _read_instance(path: Path, voxels: int) -> "tuple[Dataset, np.ndarray, list[Place]]":
    """(data set without pixels, [frames, H, W] after the rescale or [frames, H, W, 3] uint8, their places); `voxels` were there."""
    try:
        dataset = open_dataset(read_bounded(path, MAX_BYTES))
        frames = int(dataset.get("NumberOfFrames") or 1)
        if voxels + frames * dataset.Rows * dataset.Columns > MAX_VOXELS:
            raise InputError(f"its header promises more voxels than a volume may have ({MAX_VOXELS:,})")
        pixels = decoded(dataset)
        colours = as_colours(dataset, pixels)
        pixels = pixels if colours is None else colours
        pixels = pixels.reshape(frames, dataset.Rows, dataset.Columns, *pixels.shape[-1:] * (colours is not None))
        if colours is None:
            pixels = np.stack([_rescaled(values, display_of(dataset, frame)) for frame, values in enumerate(pixels)])
        places = [place_of(dataset, frame) for frame in range(frames)]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise every kind of exception for damaged or hostile bytes
        raise InputError(f"{path}: damaged DICOM: {' '.join(str(error).split())[:160] or type(error).__name__}") from None
    for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
        if tag in dataset:
            del dataset[tag]
    return dataset, pixels, places


def _rescaled(stored: np.ndarray, display: "Dataset") -> np.ndarray:
    """[H, W] after the modality's rescale; padding counts as the lowest of the rest."""
    from pydicom.pixels import apply_modality_lut

    values = kept(apply_modality_lut(stored, display))
    if (padding := display.get("PixelPaddingValue")) is not None:
        limit = display.get("PixelPaddingRangeLimit", padding)
        outside = (stored >= min(padding, limit)) & (stored <= max(padding, limit))
        if outside.any() and not outside.all():
            values = np.where(outside, values[~outside].min(), values)
    return values
