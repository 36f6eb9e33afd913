"""A slice of a volume where a single image is meant: `scan.nii.gz`, a folder with a series, `scan.dcm#slice=12&window=40,400`.

Without `slice` it is the middle one, `num_slices // 2`, of the slices in their order; without `window` as the file says.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from engine.data.volumes.nifti import is_nifti
from engine.data.volumes.read import is_folder, read_volume, slice_of
from engine.data.volumes.values import Pictures, read_window
from engine.files import visible_files

SAID = re.compile(r"(?P<file>.+)#(?P<said>(?:slice|window)=[^#&]*(?:&(?:slice|window)=[^#&]*)?)")
WORD = re.compile(r"(slice|window)=([^#&]*)")


@dataclass(frozen=True)
class View:
    """What of which file or folder is looked at."""

    file: Path
    slice: str | None = None
    window: str | None = None

    @classmethod
    def of(cls, path: str | Path) -> "View":
        """A file that is really called so is taken as it is."""
        found = SAID.fullmatch(str(path))
        if found is None or _exists(Path(path)):
            return cls(Path(path))
        said = dict(WORD.findall(found["said"]))
        return cls(Path(found["file"]), said.get("slice"), said.get("window"))

    @property
    def is_of_volume(self) -> bool:
        """Whether a volume has to be opened for it; else the file is an image as any other."""
        return self.slice is not None or self.window is not None or is_nifti(self.file) or self.is_folder

    @property
    def is_folder(self) -> bool:
        return is_folder(self.file)

    def stamp(self) -> list[int]:
        """Sizes and times of the file or of those in the folder: what tells of a change. OSError or ValueError if none is there."""
        status = self.file.stat()
        inside = [path.stat() for path in visible_files(self.file, "**/*")] if self.is_folder else []
        return [number for each in (status, *inside) for number in (each.st_size, each.st_mtime_ns)]

    def open_all(self) -> list[Image.Image]:
        """Every slice as RGB."""
        window, volume = read_window(self.window), read_volume(self.file)
        return list(map(Pictures(volume, window), range(volume.shape[0])))

    def open(self, series: str | None = None) -> Image.Image:
        """The slice as RGB. InputError where there is no volume or no such slice in it."""
        window, volume = read_window(self.window), read_volume(self.file, series=series)
        return Pictures(volume, window)(slice_of(self.slice, volume.shape[0]))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
