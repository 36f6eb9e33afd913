"""A mask from a file whose voxels lie in another order, or over a part, of the same space: brought onto a volume's, exactly."""

from pathlib import Path

import numpy as np

from engine.data.volumes.dicom.segmentation import read_segmentation
from engine.data.volumes.nifti import is_nifti, read_nifti
from engine.data.volumes.volume import Volume
from engine.errors import InputError

SAME_PLACE = 0.1  # voxels that two grids of the same space may differ by


def read_mask_volume(path: str | Path, volume: Volume) -> np.ndarray:
    """[slices, rows, columns] bool: what a NIfTI file or a DICOM segmentation marks, on the volume's voxels; InputError."""
    if is_nifti(path):
        mask = read_nifti(path)
        return onto(mask.voxels != 0, mask.affine, volume, str(path))
    marked, affine = read_segmentation(path)
    return onto(marked, affine, volume, str(path))


def onto(marked: np.ndarray, affine: np.ndarray, volume: Volume, name: str) -> np.ndarray:
    """A mask [a, b, c] on a grid of its own -> on the volume's, exactly; 0 where the mask's grid does not reach.

    InputError, which calls the mask `name`, where a voxel of one does not lie on a voxel of the other.
    """
    mapping = np.linalg.inv(affine) @ volume.affine  # slice, row, column -> a, b, c
    whole = np.round(mapping)
    corners = np.array(np.meshgrid(*[[0, side - 1] for side in volume.shape], [1])).reshape(4, -1)
    turned = np.array_equal(np.abs(whole[:3, :3]).sum(0), [1, 1, 1]) and np.array_equal(np.abs(whole[:3, :3]).sum(1), [1, 1, 1])
    if not turned or np.abs((mapping - whole) @ corners).max() > SAME_PLACE:
        raise InputError(f"{name}: its voxels do not lie on those of the volume (expected the same space and spacing)")
    axes = np.abs(whole[:3, :3]).argmax(0)  # of the mask, for slice, row, column
    placed = np.zeros(volume.shape, marked.dtype)
    ours: list[slice] = []
    theirs: list[np.ndarray] = []
    for own, axis in enumerate(axes):
        index = (whole[axis, own] * np.arange(volume.shape[own]) + whole[axis, 3]).astype(np.int64)
        reached = np.flatnonzero((index >= 0) & (index < marked.shape[axis]))
        ours.append(slice(int(reached[0]), int(reached[-1]) + 1) if reached.size else slice(0, 0))
        theirs.append(index[reached])
    placed[tuple(ours)] = marked.transpose(axes)[np.ix_(*theirs)]
    return placed
