"""Which files are the masks of an image, by their names.

The mask of `x.jpg` is called `x`, or, always where both lie in one folder, `x` and one of WORDS: `x_mask.png`,
`x-Segmentation.tif`. Several of one word that are numbered (`x_mask.png`, `x_mask_1.png`, `x_mask_2.png`, as in BUSI) are parts of
one mask.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from engine.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".dcm", ".dicom")
WORDS = ["mask", "masks", "seg", "segmentation", "segmented", "lesion", "lesions", "label", "labels", "annotation", "roi", "gt"]
WORDS += ["groundtruth", "ground_truth"]
ENDING = re.compile(rf"(?P<image>.*[^_. -])[_. -]+(?P<word>{'|'.join(WORDS)})(?:[_ -]?(?P<number>\d{{1,4}}))?", re.IGNORECASE)
KNOWN = f"of the same name, or ending in {', '.join(f'_{word}' for word in WORDS)}, also numbered"


def split_name(name: str) -> tuple[str, str, int] | None:
    """(name of the image, word, number) of a mask's name without its suffix; None where it ends in no such word."""
    found = ENDING.fullmatch(name)
    return (found["image"], found["word"].lower(), int(found["number"] or 0)) if found else None


class MaskNames:
    """The files of a folder by the images whose masks they may be."""

    def __init__(self, files: Iterable[tuple[str, Path]]) -> None:
        """`files`: (name without its suffix, which may have folders in it; file)."""
        self.exact: dict[str, list[Path]] = {}
        self.ended: dict[str, dict[str, dict[int, list[Path]]]] = {}
        for name, file in files:
            self.exact.setdefault(name, []).append(file)
            if parts := split_name(name):
                image, word, number = parts
                self.ended.setdefault(image, {}).setdefault(word, {}).setdefault(number, []).append(file)

    def masks_of(self, image: str, suffix: str = "", in_one_folder: bool = False) -> tuple[Path, ...]:
        """The masks of an image of this name, in the order of their numbers; () if there are none.

        Of files that differ in their suffix alone it is the one with the image's. InputError where several could each be its mask.
        """
        choices = [*self.ended.get(image, {}).values()]
        if image in self.exact and not in_one_folder:
            choices.insert(0, {0: self.exact[image]})
        if not choices:
            return ()
        found = [self._only(files, image, suffix) for _, files in sorted(choices[0].items())]
        if len(choices) > 1:
            self._only([found[0], *next(iter(choices[1].values()))], image, "")
        return tuple(found)

    def parts_of(self, mask: Path) -> tuple[Path, ...]:
        """All parts of the mask that this file of the folder is a part of, itself too."""
        parts = split_name(mask.stem)
        if parts is None:
            return (mask,)
        image, word, number = parts
        numbered = sorted(self.ended[image][word].items())
        return tuple(mask if n == number else self._only(files, image, mask.suffix) for n, files in numbered)

    @staticmethod
    def _only(files: Sequence[Path], image: str, suffix: str) -> Path:
        alike = [file for file in files if file.suffix == suffix] or files
        if len(alike) > 1:
            names = " and ".join(file.name for file in alike[:2])
            raise InputError(f"{alike[0].parent}: {names} could each be the mask of {image!r} (expected one of them)")
        return alike[0]

    def is_mask(self, name: str) -> bool:
        """Whether a file of this name is the mask of another file that is there."""
        parts = split_name(name)
        return parts is not None and parts[0] in self.exact


def bare_name(path: Path | PurePosixPath, folder: Path) -> str:
    """The path from `folder`, without its suffix, with slashes."""
    return path.relative_to(folder).with_suffix("").as_posix()
