"""A segmenter that can be foretold: the object is what is bright and of one piece."""

import numpy as np
from scipy import ndimage


class Bright:
    """Of the pieces brighter than half, that which covers most of the box, or has a point inside; none with a point outside."""

    name, license = "bright", "Apache-2.0"

    def __init__(self):
        self.looked = []  # sizes of the slices

    def look(self, pixels):
        self.looked.append(pixels.shape)
        grey = pixels if pixels.ndim == 2 else pixels.mean(-1)
        return ndimage.label(grey > 128)[0]

    def segment(self, seen, prompt):
        wanted = {int(seen[int(y), int(x)]) for x, y, label in prompt.points if label}
        if prompt.box is not None:
            x1, y1, x2, y2 = (int(side) for side in prompt.box)
            counts = np.bincount(seen[y1:y2, x1:x2].ravel())
            counts[0] = 0
            wanted.add(int(counts.argmax()))
        unwanted = {int(seen[int(y), int(x)]) for x, y, label in prompt.points if not label} | {0}
        return np.isin(seen, list(wanted - unwanted)), 0.9
