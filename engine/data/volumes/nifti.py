"""NIfTI files (.nii, .nii.gz; NIfTI-1 and 2 in one file) as volumes, and masks back into the geometry that they came in.

Slices run along the third axis and keep its numbers. Within a slice rows and columns are turned in steps of 90 degrees, or
mirrored, so that it is seen as radiologists see it, and as the DICOM of the same study: the patient's left, or on sagittal slices
the back, on the right; the feet, or on axial slices the back, below. `Turn` remembers how, and a mask goes the same way back.
"""

import gzip
import io
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.data.decoders.scaling import to_uint8
from engine.data.volumes.values import kept
from engine.data.volumes.volume import MAX_VOXELS, Volume
from engine.errors import InputError
from engine.files import read_bounded, write_whole

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

ENDINGS = (".nii", ".nii.gz")
MAX_BYTES = 2**31  # of a file, and of what a compressed one holds
SIZES = {348: "Nifti1", 540: "Nifti2"}  # of a header, which it begins with
TEXTS = ("descrip", "aux_file", "intent_name", "db_name")  # of a header: what somebody wrote there stays in the source
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from RAS, and back
LEFT, BACK, HEAD = 0, 1, 2


class Turn(NamedTuple):
    """A slice [i, j] as stored -> [rows, columns] as shown."""

    row_axis: int  # 0 or 1: which of i and j the rows are
    flip_rows: bool
    flip_columns: bool

    def show(self, stored: np.ndarray) -> np.ndarray:
        """[i, j, k] -> [slices, rows, columns], a view."""
        turned = stored.transpose(2, self.row_axis, 1 - self.row_axis)
        return turned[:, :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def store(self, shown: np.ndarray) -> np.ndarray:
        """[slices, rows, columns] -> [i, j, k], a view."""
        turned = shown[:, :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return turned.transpose((1, 2, 0) if self.row_axis == 0 else (2, 1, 0))

    def affine(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The affine of i, j, k, whatever its space, -> that of slice, row, column; `shape` is that of [i, j, k]."""
        index = np.zeros((4, 4))
        index[3, 3] = 1
        axes = ((2, False), (self.row_axis, self.flip_rows), (1 - self.row_axis, self.flip_columns))
        for ours, (theirs, flipped) in enumerate(axes):
            index[theirs, ours] = -1 if flipped else 1
            index[theirs, 3] = shape[theirs] - 1 if flipped else 0
        return stored @ index


@dataclass(frozen=True)
class NiftiSource:
    """Where a volume was read from."""

    header: Any  # nibabel's
    turn: Turn
    inverted: bool = False

    def shown(self, values: np.ndarray, index: int) -> np.ndarray | None:
        """By cal_min and cal_max, where the header has them."""
        low, high = float(self.header["cal_min"]), float(self.header["cal_max"])
        return to_uint8(values, low, high) if np.isfinite([low, high]).all() and high > low else None


def is_nifti(path: str | Path) -> bool:
    """By the name."""
    return str(path).lower().endswith(ENDINGS)


def read_nifti(path: str | Path) -> Volume:
    """The volume in a file. InputError of one line where it is damaged, too large, of more than three dimensions, or no numbers."""
    nibabel = _nibabel()
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    try:
        start = _unpack(data, 540)
        size = next(size for size in SIZES if size in {int.from_bytes(start[:4], order) for order in ("little", "big")})
    except (StopIteration, OSError, EOFError, zlib.error):
        raise InputError(f"{path}: no NIfTI file, or damaged (expected .nii or .nii.gz)") from None
    try:
        header = getattr(nibabel, f"{SIZES[size]}Header").from_fileobj(io.BytesIO(start), check=True)
        shape, kind = _checked_shape(header, path)
        offset = int(header["vox_offset"]) or header.single_vox_offset
        length = offset + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if not 0 <= offset < 2**24:
            raise InputError(f"{path}: its header says that the voxels begin at byte {offset}")
        if length > MAX_BYTES:
            raise InputError(f"{path}: its header promises {length:,} bytes (expected at most {MAX_BYTES:,})")
        content = _unpack(data, length + 1)  # to the end, where the checksum is
        del data
        if len(content) < length:
            raise InputError(f"{path}: {len(content):,} bytes, where its header promises {length:,}")
        stored = np.frombuffer(memoryview(content)[offset:length], kind).reshape(shape, order="F")
        affine = LPS @ header.get_best_affine()
        values = _rescaled(stored, *header.get_slope_inter())
    except InputError:
        raise
    except Exception as error:  # nibabel has many kinds for hostile headers
        raise InputError(f"{path}: damaged NIfTI: {' '.join(str(error).split())[:160]}") from None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: its affine does not place the voxels in space (expected three independent directions)")
    turn = radiological_turn(affine)
    voxels = np.ascontiguousarray(turn.show(kept(values)))
    return Volume(voxels, turn.affine(affine, shape), NiftiSource(header, turn))


def radiological_turn(affine: np.ndarray) -> Turn:
    """How slices along the third axis are to be turned; `affine` of [i, j, k] in LPS."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    anatomy = _closest_axes(directions)  # of i, j and k
    if HEAD in anatomy[:2]:
        row_axis, down = anatomy[:2].index(HEAD), -1  # the feet below
    else:
        row_axis, down = anatomy[:2].index(BACK), 1
    row, column = directions[:, row_axis], directions[:, 1 - row_axis]
    return Turn(row_axis, bool(row[anatomy[row_axis]] * down < 0), bool(column[anatomy[1 - row_axis]] < 0))


def _closest_axes(directions: np.ndarray) -> list[int]:
    """The anatomical axis of each column [3, 3], all different, the best fit of all first."""
    strength, found = np.abs(directions), [0, 0, 0]
    for _ in range(3):
        anatomical, ours = np.unravel_index(np.argmax(strength), strength.shape)
        found[int(ours)] = int(anatomical)
        strength[anatomical], strength[:, ours] = -1, -1
    return found


def write_nifti(path: str | Path, volume: Volume, values: np.ndarray) -> None:
    """Labels [slices, rows, columns] uint8, or probabilities [labels, ...] float32, in the volume's own geometry, written whole.

    Of a volume that was NIfTI: its axes and its affine, to the bit. Else i, j and k are columns, rows and slices, the affine RAS.
    """
    nibabel = _nibabel()
    parts = values if values.ndim == 4 else values[None]
    if isinstance(volume.source, NiftiSource):
        stored = [volume.source.turn.store(part) for part in parts]
        header = _blank(volume.source.header)
        affine = None  # the header's
    else:
        stored = [part.transpose(2, 1, 0) for part in parts]
        header, affine = nibabel.Nifti1Header(), LPS @ volume.affine[:, [2, 1, 0, 3]]
        header.set_xyzt_units("mm")
    joined = stored[0] if len(stored) == 1 else np.stack(stored, axis=-1)
    kind = nibabel.Nifti2Image if header.sizeof_hdr == 540 else nibabel.Nifti1Image
    header.set_data_dtype(joined.dtype)
    image = kind(np.asfortranarray(joined), affine, header)
    content = image.to_bytes()
    write_whole(path, gzip.compress(content, 6, mtime=0) if str(path).lower().endswith(".gz") else content)


def _blank(header: "Nifti1Header") -> Any:
    """A copy that says where voxels are, and nothing of what the source's values were or whose."""
    made = header.copy()
    for name in TEXTS:
        made[name] = b""
    made["cal_min"] = made["cal_max"] = 0
    made["magic"] = header.single_magic
    made["vox_offset"] = 0
    made.set_slope_inter(1, 0)
    made.extensions.clear()
    return made


def _checked_shape(header: "Nifti1Header", path: str | Path) -> tuple[tuple[int, int, int], np.dtype]:
    shape, kind = tuple(int(side) for side in header.get_data_shape()), header.get_data_dtype()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        sides = " x ".join(map(str, shape))
        raise InputError(f"{path}: {sides} are several volumes in one file (expected one: three dimensions)")
    shape += (1,) * (3 - len(shape))
    if kind.names or kind.kind not in "biuf" or kind.itemsize > 8:
        raise InputError(f"{path}: values of type {header.get_value_label('datatype')} (expected integers or real numbers)")
    if min(shape) < 1 or np.prod([float(side) for side in shape]) > MAX_VOXELS:
        raise InputError(f"{path}: its header says {' x '.join(map(str, shape))} voxels (expected 1 to {MAX_VOXELS:,})")
    return (shape[0], shape[1], shape[2]), kind


def _rescaled(stored: np.ndarray, slope: float | None, intercept: float | None) -> np.ndarray:
    if slope in (None, 0) or (slope, intercept) == (1, 0):
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)
    kind = np.dtype(np.float64 if stored.dtype.itemsize > 2 else np.float32).type
    return stored.astype(kind) * kind(slope) + kind(intercept or 0)


def _unpack(data: bytes, length: int) -> bytes:
    """At most `length` bytes of the content, of which a compressed file may hold far more."""
    if not data.startswith(b"\x1f\x8b"):
        return data[:length]
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        return file.read(length)


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError:
        raise InputError("NIfTI files need the package nibabel: pip install 'vesalius[volumes]'") from None
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it would print what it thinks of a header
    return nibabel
