"""Several structures over one volume as one array of labels."""

from collections.abc import Sequence

import numpy as np

INSIDE = 128  # levels of a mask are 0 to 255; from here on they are inside


def label_map(levels: Sequence[np.ndarray]) -> np.ndarray:
    """Levels [slices, rows, columns] uint8 of each structure -> uint8: the number from 1 of the highest, or 0."""
    labels = np.zeros(levels[0].shape, np.uint8)
    highest = np.full(levels[0].shape, INSIDE - 1, np.uint8)
    for number, part in enumerate(levels, 1):
        higher = part > highest
        labels[higher], highest[higher] = number, part[higher]
    return labels
