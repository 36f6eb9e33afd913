"""A volume: voxels in slices, where they lie in the patient, and which file or files they came from.

    [x, y, z, 1] = affine @ [slice, row, column, 1]      mm, LPS: x grows to the patient's left, y to the back, z to the head

LPS is DICOM's convention; NIfTI's is RAS, whose first two axes point the other way. Indices are those of voxels' centres.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

MAX_VOXELS = 2**29  # 1 GiB of int16: 2,000 slices of 512 x 512


class Source(Protocol):
    """The file or files of a volume."""

    def shown(self, values: np.ndarray, index: int) -> np.ndarray | None:
        """The values [H, W] of slice `index` as the source itself says they are to be shown: uint8; None where it says nothing."""

    @property
    def inverted(self) -> bool:
        """Whether low values are to be bright (MONOCHROME1)."""


@dataclass(frozen=True)
class Volume:
    """What a reader of this room makes of a file or a folder."""

    voxels: np.ndarray  # [slices, rows, columns], int16, uint16, int32 or float32 after the rescale of the file; or [..., 3] uint8
    affine: np.ndarray  # [4, 4] float64
    source: Source
    placed: bool = True  # whether the affine's origin and directions are the patient's; else pixels and slices of 1 mm or as said

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        slices, rows, columns = self.voxels.shape[:3]
        return slices, rows, columns

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm from slice to slice, from row to row and from column to column, along each axis's own direction."""
        slices, rows, columns = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(slices), float(rows), float(columns)

    @property
    def voxel_volume(self) -> float:
        """mm3, also where the slices are sheared (a tilted gantry)."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def is_colour(self) -> bool:
        return self.voxels.ndim == 4

    def counted(self, mask: np.ndarray) -> dict[str, float | None]:
        """Slices with something in them and voxels of a mask, and its ml; None where the file does not say how large a voxel is."""
        voxels = int(np.count_nonzero(mask))
        millilitres = voxels * self.voxel_volume / 1000 if self.placed else None
        return {"slices": int(mask.any((1, 2)).sum()), "voxels": voxels, "volume_ml": millilitres}

    def position(self, index: int, row: float, column: float) -> np.ndarray:
        """[3] mm, LPS: the centre of a voxel."""
        return (self.affine @ np.array([index, row, column, 1.0]))[:3]
