"""A volume from whatever holds one, by what it is: NIfTI, a folder with a DICOM series, a DICOM file."""

import re
from pathlib import Path

from engine.data.volumes.dicom.series import read_dicom_file, read_series
from engine.data.volumes.nifti import is_nifti, read_nifti
from engine.data.volumes.volume import Volume
from engine.errors import InputError

EXPECTED = "a DICOM file, a folder with a DICOM series, .nii or .nii.gz"


def read_volume(path: str | Path, *, series: str | None = None) -> Volume:
    """The volume at `path`; `series` chooses where a folder holds several. InputError of one line where there is none."""
    place = Path(path)
    if is_folder(place):
        return read_series(place, series)
    if series is not None:
        raise InputError(f"--series {series}: {path} is no folder")
    return read_nifti(place) if is_nifti(place) else read_dicom_file(place)


def is_folder(path: Path) -> bool:
    """No, too, where the path is none that can be."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def slice_of(text: str | int | None, num_slices: int, name: str = "--slice") -> int:
    """The number of a slice, from 0; None is the middle one. InputError where there is none such."""
    if text is None:
        return num_slices // 2
    if not re.fullmatch("[0-9]{1,9}", str(text)) or int(text) >= num_slices:
        raise InputError(f"{name} {text}: expected a slice from 0 to {num_slices - 1}")
    return int(text)
