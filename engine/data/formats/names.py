"""The file that a row names: written on another system, or beside the folder of images that its data set has."""

import os
import unicodedata
from pathlib import Path

# Where published data sets keep the images that their rows name by the rest of the path: SLAKE, VQA-RAD, Med-R1, others.
IMAGE_FOLDERS = ("imgs", "VQA_RAD Image Folder", "OmniMedVQA", "images")


def find_named(root: Path, name: str) -> Path:
    """The file called `name`, from `root` or from one of IMAGE_FOLDERS in it; where there is none, what it would be called.

    Backslashes may separate folders, and accents may be composed or not, in the name and on the disk. The path is normalised, and
    may lie outside `root`.
    """
    exact = Path(os.path.normpath(root / name))
    if os.path.exists(exact):
        return exact
    slashed = name.replace("\\", "/")
    places = [Path(os.path.normpath(root / folder / slashed)) for folder in ("", *IMAGE_FOLDERS)]
    found = (path if slashed.isascii() else _as_spelled(path) for path in places)
    return next((path for path in found if os.path.exists(path)), places[0])


def _as_spelled(path: Path) -> Path:
    """The path with the accents of each folder and file as they are on the disk."""
    spelled = Path(path.anchor)
    for part in path.parts[1:]:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        spelled = next((spelled / form for form in forms if os.path.exists(spelled / form)), spelled / part)
    return spelled
