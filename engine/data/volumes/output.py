"""Where the masks of a volume go: a DICOM segmentation or a NIfTI file, by the name."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.data.volumes.dicom.segmentation import check_source, write_segmentation
from engine.data.volumes.labels import INSIDE, label_map
from engine.data.volumes.nifti import ENDINGS, NiftiSource, is_nifti, write_nifti
from engine.data.volumes.volume import Volume
from engine.errors import InputError
from engine.files import refuse_overwriting, refuse_unwritable

DICOM_ENDINGS = (".dcm", ".dicom")


def check_output(out: str | None, inputs: Mapping[str, str | None], volume: Volume | None = None) -> Path | None:
    """`--out` as a path; InputError if its ending is unknown, it is a folder, a file that is read, or not for such a volume."""
    if volume is not None and not is_nifti(name := out or default_name(volume)):
        check_source(f"--out {name}", volume)
    if not out:
        return None
    if not out.lower().endswith((*DICOM_ENDINGS, *ENDINGS)):
        raise InputError(f"--out {out}: expected a name that ends in .dcm, .nii or .nii.gz")
    if os.path.isdir(out):
        raise InputError(f"--out {out}: is a folder (expected a file to write)")
    refuse_overwriting({"--out": out, "the overlay of --out,": overlay_beside(Path(out))}, inputs)
    refuse_unwritable("--out", Path(out))
    return Path(out)


def default_name(volume: Volume) -> str:
    """Of the file where none is named."""
    return "seg.nii.gz" if isinstance(volume.source, NiftiSource) else "seg.dcm"


def overlay_beside(out: Path) -> Path:
    """seg.nii.gz -> seg.overlay.png."""
    name = out.name
    for ending in (*DICOM_ENDINGS, *reversed(ENDINGS)):
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return out.with_name(f"{name}.overlay.png")


def write_labels(
    out: Path, volume: Volume, levels: Sequence[np.ndarray], names: Sequence[str], *, form: str, algorithm: str
) -> None:
    """Levels [slices, rows, columns] uint8 of each structure in the form that `--form` names, written whole.

    In NIfTI `binary` and `fractional` (0 to 1) have a fourth axis where there are several structures.
    """
    try:
        if not is_nifti(out):
            write_segmentation(out, volume, levels, names, form=form, algorithm=algorithm)
        elif form == "labelmap":
            write_nifti(out, volume, label_map(levels))
        else:
            stacked = np.stack(levels)
            values = (stacked >= INSIDE).astype(np.uint8) if form == "binary" else stacked.astype(np.float32) / 255
            write_nifti(out, volume, values)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
