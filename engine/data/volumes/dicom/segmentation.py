"""DICOM segmentations (PS3.3 A.51 and A.91) of the images that a volume was read from, by highdicom.

A segmentation belongs to its patient's study: as the standard asks, it carries the name and the identifiers of the images it refers
to. It is the one thing written here that does.
"""

import io
import logging
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.decoders.dicom import say_no_values
from engine.data.volumes.dicom.series import MAX_BYTES, DicomSource
from engine.data.volumes.labels import INSIDE, label_map
from engine.data.volumes.volume import MAX_VOXELS, Volume
from engine.errors import InputError
from engine.files import read_bounded, write_whole

FORMS = ("labelmap", "binary", "fractional")
EMPTY = "PatientID PatientName PatientBirthDate PatientSex AccessionNumber StudyID StudyDate StudyTime".split()  # may be (type 2)
SERIES_NUMBER = 9000  # on from the source's, far from those that a scanner gives


def write_segmentation(
    path: str | Path, volume: Volume, levels: Sequence[np.ndarray], names: Sequence[str], *, form: str, algorithm: str
) -> None:
    """Levels [slices, rows, columns] uint8 (0 to 255) of each structure as one DICOM file, written whole.

    `form`: labelmap (one label a voxel), binary (structures may overlap) or fractional (the levels as probabilities). `algorithm`:
    the model's name. Of a volume that `check_source` let pass.
    """
    assert isinstance(volume.source, DicomSource)  # `check_source` was asked
    if form == "labelmap":
        pixels = label_map(levels)
    elif form == "binary":
        pixels = np.stack([part >= INSIDE for part in levels], axis=-1).astype(np.uint8)
    else:
        pixels = np.stack(levels, axis=-1).astype(np.float32) / 255
    if len(volume.source.instances) == 1:  # its frames may lie in another order
        pixels = pixels[np.argsort(volume.source.frames, kind="stable")]
    write_whole(path, _encoded(_made(path, volume.source.instances, pixels, names, form, algorithm)))


def check_source(path: str | Path, volume: Volume) -> None:
    """InputError, before anything is segmented: the volume was no DICOM, or its headers lack what a segmentation says."""
    if not isinstance(volume.source, DicomSource):
        raise InputError(f"{path}: a DICOM segmentation refers to DICOM images (expected .nii or .nii.gz for a NIfTI volume)")
    if not volume.placed and volume.shape[0] > 1:
        raise InputError(f"{path}: frames without a place in the patient, which no segmentation can refer to (expected .nii.gz)")
    first = volume.source.instances[:1]
    empty = np.zeros((int(first[0].get("NumberOfFrames") or 1), *volume.shape[1:]), np.uint8)
    _made(path, first, empty, ["empty"], "labelmap", "empty")


def _made(path: str | Path, instances: list[Any], pixels: np.ndarray, names: Sequence[str], form: str, algorithm: str) -> Any:
    """highdicom's, which takes what may be empty for granted."""
    highdicom = _highdicom()
    for name in EMPTY:
        instances[0].setdefault(name, "")
    try:
        return highdicom.seg.Segmentation(
            source_images=instances,
            pixel_array=pixels,
            segmentation_type=form.upper(),
            segment_descriptions=[_description(highdicom, number, name, algorithm) for number, name in enumerate(names, 1)],
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER + int(instances[0].get("SeriesNumber") or 0) % SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="Vesalius",
            manufacturer_model_name=algorithm,
            software_versions=_version(),
            device_serial_number="0",
            series_description=f"Segmentation by {algorithm}"[:64],
            omit_empty_frames=bool(pixels.any()),
        )
    except (AttributeError, KeyError) as error:
        lacking = re.findall(r"'([A-Z]\w+)'$|attribute '(\w+)'", str(error))
        what = "".join(lacking[0]) if lacking else "whole header"
        raise InputError(f"{path}: the source has no {what}, which a segmentation needs (expected .nii.gz)") from None
    except (ValueError, TypeError) as error:  # whose text may hold values of the patient's
        raise InputError(
            f"{path}: the source's header is not as the standard has it ({type(error).__name__}, expected .nii.gz)"
        ) from None


def read_segmentation(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(what any segment marks [slices, rows, columns] bool, affine [4, 4] in LPS) of a DICOM segmentation; InputError."""
    highdicom = _highdicom()
    try:
        made = highdicom.seg.segread(io.BytesIO(read_bounded(path, MAX_BYTES)))
        if int(made.NumberOfFrames) * made.Rows * made.Columns > MAX_VOXELS:
            raise InputError(f"{path}: its header promises more voxels than a volume may have ({MAX_VOXELS:,})")
        found = made.get_volume(combine_segments=False)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # no segmentation, or a damaged one
        raise InputError(f"{path}: no DICOM segmentation that can be read as a volume ({type(error).__name__})") from None
    values = np.asarray(found.array)
    marked = np.asarray(values > (0.5 if values.dtype.kind == "f" else 0))
    return np.asarray(marked.any(axis=-1)) if marked.ndim == 4 else marked, np.asarray(found.affine)


def _description(highdicom: Any, number: int, name: str, algorithm: str) -> Any:
    from pydicom.sr.codedict import codes

    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type="SEMIAUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(algorithm, codes.DCM.ArtificialIntelligence, _version()),
    )


def _encoded(dataset: Any) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _version() -> str:
    try:
        return version("vesalius")
    except PackageNotFoundError:  # run from a checkout
        return "0"


def _highdicom() -> Any:
    try:
        import highdicom
    except ImportError:
        raise InputError("DICOM segmentations need the package highdicom: pip install 'vesalius[volumes]'") from None
    say_no_values()
    warnings.filterwarnings("ignore", module="highdicom")  # these hold the patient's name
    logging.getLogger("highdicom").setLevel(logging.ERROR)
    return highdicom
