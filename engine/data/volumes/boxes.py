"""Boxes in slices, as the command line says them: `12:30,40,90,110`, or of several structures `liver=12:30,40,90,110`."""

import re
from collections.abc import Sequence

from engine.data.volumes.propagate import Prompt
from engine.data.volumes.read import slice_of
from engine.errors import InputError

UNNAMED = "segment"
MOST_LABELS = 255  # that a byte holds
BOX = re.compile(r"(?:(?P<label>[^=:]{1,64})=)?(?:(?P<slice>\d{1,6}):)?[\[(]?(?P<corners>[^:=()\[\]]+)[\])]?")
BOX_FORM = '"slice:x1,y1,x2,y2", or "label=slice:x1,y1,x2,y2"'


def read_boxes(texts: Sequence[str], shape: tuple[int, int, int], only: int | None = None) -> dict[str, dict[int, Prompt]]:
    """`--boxes` as {label: {slice: box}}, checked against the volume's slices, rows and columns; InputError.

    `only`: the slice that a box without one is in, and no box may be in another.
    """
    found: dict[str, dict[int, Prompt]] = {}
    slices, rows, columns = shape
    for text in texts:
        parts = BOX.fullmatch(text.strip())
        try:
            if parts is None or parts["slice"] is None and only is None:
                raise ValueError
            x1, y1, x2, y2 = (float(corner) for corner in parts["corners"].split(","))
        except ValueError:
            raise InputError(f"--boxes {text}: expected {BOX_FORM}") from None
        index = slice_of(parts["slice"] or only, slices, f"--boxes {text}: slice")
        if only is not None and index != only:
            raise InputError(f"--boxes {text}: expected one in slice {only}, which --slice names")
        if not (0 <= x1 < x2 <= columns and 0 <= y1 < y2 <= rows):
            raise InputError(f"--boxes {text}: expected 0 <= x1 < x2 <= {columns} and 0 <= y1 < y2 <= {rows}")
        prompts = found.setdefault((parts["label"] or UNNAMED).strip() or UNNAMED, {})
        if index in prompts:
            raise InputError(f"--boxes {text}: expected one box a slice of each label")
        prompts[index] = Prompt(box=(x1, y1, x2, y2))
    if len(found) > MOST_LABELS:
        raise InputError(f"--boxes: {len(found)} labels (expected at most {MOST_LABELS})")
    return found
