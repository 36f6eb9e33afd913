"""Where the slices of a DICOM volume lie (PS3.3 C.7.6.2): put in order along their normal, and held to one straight, even stack.

normal   = row direction x column direction          of ImageOrientationPatient: along a row, then along a column
distance = normal . ImagePositionPatient             mm: what the slices are ordered by, never a name or number of theirs
affine   = [step | down * row spacing | along * column spacing | first position]       step: from slice to slice
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.data.decoders.dicom import groups_of
from engine.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

SAME_DIRECTION = 2e-3  # largest difference of a direction's cosines within a stack; files round them
EVEN = 0.05  # part of the usual distance that another may differ by
LEAST = 0.01  # mm that positions may differ by: their rounding


NAMES = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")


class Place(NamedTuple):
    """Of one slice; None where the file does not say."""

    position: np.ndarray | None  # [3] mm, LPS: the first pixel's centre
    directions: np.ndarray | None  # [2, 3]: along a row, down a column
    spacing: tuple[float, float] | None  # mm from row to row, from column to column
    thickness: float | None  # mm
    size: tuple[int, int]  # rows, columns


def place_of(dataset: "Dataset", frame: int) -> Place:
    """Of a frame; functional groups go before what the data set itself says, and frames of a dose grid lie at its offsets."""
    said = {name: dataset.get(name) for name in NAMES}
    for group in groups_of(dataset, frame):
        for sequence in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"):
            for item in list(group.get(sequence) or [])[:1]:
                said |= {name: item[name].value for name in said if name in item}
    position = _numbers(said["ImagePositionPatient"], 3)
    directions = _numbers(said["ImageOrientationPatient"], 6)
    spacing = _numbers(said["PixelSpacing"], 2)
    thickness = _numbers([said["SliceThickness"]], 1)
    offsets = dataset.get("GridFrameOffsetVector")
    if position is not None and directions is not None and offsets and frame < len(offsets):
        relative = float(offsets[frame]) - (0 if float(offsets[0]) == 0 else position[2])
        position = position + relative * np.cross(directions[:3], directions[3:])
    return Place(
        position,
        None if directions is None else directions.reshape(2, 3),
        None if spacing is None or min(spacing) <= 0 else (float(spacing[0]), float(spacing[1])),
        None if thickness is None or thickness[0] <= 0 else float(thickness[0]),
        (int(dataset.Rows), int(dataset.Columns)),
    )


def stack(places: list[Place]) -> tuple[list[int], np.ndarray, bool]:
    """(the order of the slices, affine [4, 4] of slice, row, column in that order, whether that is the patient's space).

    InputError, half a line, for slices that are no stack: of several sizes or orientations, two at one place, one missing, uneven.
    """
    sizes = sorted({place.size for place in places})
    if len(sizes) > 1:
        raise InputError(f"slices of {len(sizes)} sizes ({_listed(sizes)}), expected one")
    spacings = {place.spacing and tuple(round(side, 4) for side in place.spacing) for place in places}
    if len(spacings) > 1:
        raise InputError(f"slices of {len(spacings)} pixel spacings, expected one")
    rows, columns = places[0].spacing or (1.0, 1.0)
    placed = all(place.position is not None and place.directions is not None for place in places)
    if not placed:
        if len(places) > 1 and any(place.position is not None for place in places):
            raise InputError("not all slices have ImagePositionPatient and ImageOrientationPatient")
        return list(range(len(places))), np.diag([places[0].thickness or 1.0, rows, columns, 1.0]), False
    positions = np.array([place.position for place in places])
    along, down = _directions([place.directions for place in places if place.directions is not None])
    normal = np.cross(along, down)
    distances = positions @ normal
    order = [int(index) for index in np.argsort(distances, kind="stable")]
    step = normal * (places[0].thickness or 1.0)
    if len(places) > 1:
        _check_even(distances[order])
        step = (positions[order[-1]] - positions[order[0]]) / (len(places) - 1)
        straight = positions[order[0]] + np.arange(len(places))[:, None] * step
        if np.abs(positions[order] - straight).max() > max(LEAST, EVEN * float(np.linalg.norm(step))):
            raise InputError("the slices do not lie along one straight line")
    affine = np.eye(4)
    affine[:3] = np.stack([step, down * rows, along * columns, positions[order[0]]], axis=1)
    return order, affine, True


def _directions(all_directions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    directions = np.array(all_directions)
    if np.abs(directions - directions[0]).max() > SAME_DIRECTION:
        kinds = len(np.unique(directions.round(2).reshape(len(directions), 6), axis=0))
        raise InputError(f"slices of {max(2, kinds)} orientations, expected one (a scout among them?)")
    along, down = directions[0]
    lengths = np.linalg.norm(along), np.linalg.norm(down)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(along @ down)) > 0.01:
        raise InputError("an ImageOrientationPatient that is not two directions at a right angle")
    return along / lengths[0], down / lengths[1]


def _check_even(distances: np.ndarray) -> None:
    """Distances in order: all steps alike."""
    steps = np.diff(distances)
    usual = float(np.median(steps))
    same = int((steps <= max(LEAST, EVEN * usual)).sum())
    if same:
        raise InputError(f"{same + 1} slices at one place ({same} more than expected): several times, echoes or copies?")
    gap = int(np.argmax(steps))
    if steps[gap] > 1.5 * usual:
        missing = round(float(steps[gap]) / usual) - 1
        raise InputError(
            f"after slice {gap} comes a gap of {steps[gap]:g} mm, where slices lie {usual:g} mm apart: {max(1, missing)} missing?"
        )
    if np.abs(steps - usual).max() > max(LEAST, EVEN * usual):
        raise InputError(f"slices lie {steps.min():g} to {steps.max():g} mm apart, expected one distance")


def _numbers(values: object, count: int) -> np.ndarray | None:
    """[count] float64; None where there are none, others, or such as are not finite."""
    try:
        numbers = np.array([float(value) for value in values], dtype=np.float64)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None


def _listed(sizes: list[tuple[int, int]]) -> str:
    words = [f"{rows} x {columns}" for rows, columns in sizes]
    return ", ".join(words[:4]) + (", ..." if len(words) > 4 else "")
