"""Image files as PIL RGB, decoded once: by what is in them, whatever their names, in this run and in later ones.

`VESALIUS_IMAGE_CACHE` (`--image_cache`) names the folder of the decoded pixels, or is `off`; without it they lie in the cache
folder. `VESALIUS_IMAGE_CACHE_GB` is how large it may become (default 10); `VESALIUS_IMAGE_CACHE_FORM` is `raw`, mapped into memory
as it lies, or `lz4`, about half of the room.
"""

import functools
import hashlib
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.decoders.dicom import burned_in_allowed
from engine.data.images import decode_image, decode_pixels, open_image, open_view, read_image_file
from engine.data.loaders.pixel_store import PixelStore
from engine.data.volumes.nifti import is_nifti
from engine.data.volumes.view import View
from engine.errors import InputError
from engine.files import cache_folder

VARIABLE = "VESALIUS_IMAGE_CACHE"
TRANSFORM = b"upright RGB of 8 bits, 1"  # what was done to the file: another number for another result
Identity = tuple[str, int, int, int]  # of a file, which a change of it changes


class DecodedImages:
    """What `engine.data.images.decode_pixels` makes of files, by their content, in a store of pixels."""

    def __init__(self, store: PixelStore):
        self.store = store
        self._keys: dict[Identity, str] = {}  # of files whose content this process has read

    def pixels_of(self, path: Path) -> np.ndarray:
        """uint8 [H, W, 3], read-only. ImageError as of `engine.data.images.open_image`."""
        try:
            status = path.stat()
        except (OSError, ValueError):
            view = View.of(path)
            return self._slice(view) if view.is_of_volume else np.asarray(open_image(path))  # which says what is wrong
        if stat.S_ISDIR(status.st_mode) or is_nifti(path):
            return self._slice(View(path))
        identity = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        key = self._keys.get(identity)
        pixels = self.store.find(key) if key else None
        if pixels is not None:
            return pixels
        data = read_image_file(path)
        self._keys[identity] = key = _key_of(data, path.name)
        return self._decode(key, data, str(path))

    def _slice(self, view: View) -> np.ndarray:
        """By the volume's name, sizes and times: its content is not read to know whether a slice of it is there."""
        try:
            stamp = view.stamp()
        except (OSError, ValueError):
            return np.asarray(open_view(view))  # which says what is wrong
        key = _digest(str([str(view.file.absolute()), view.slice, view.window, stamp]).encode("utf-8", "replace"))
        pixels = self.store.find(key)
        if pixels is None:
            pixels = np.asarray(open_view(view))
            self.store.keep(key, pixels)
        return pixels

    def decode(self, data: bytes, name: str) -> np.ndarray:
        """The same of the bytes of a file."""
        return self._decode(_key_of(data, name), data, name)

    def _decode(self, key: str, data: bytes, name: str) -> np.ndarray:
        pixels = self.store.find(key)
        if pixels is None:
            pixels = decode_pixels(data, name)
            self.store.keep(key, pixels)
        return pixels


def open_decoded(path: Path) -> Image.Image:
    """As `engine.data.images.open_image`."""
    images = decoded_images()
    return open_image(path) if images is None else Image.fromarray(images.pixels_of(path))


def decode_once(data: bytes, name: str) -> Image.Image:
    """As `engine.data.images.decode_image`."""
    images = decoded_images()
    return decode_image(data, name) if images is None else Image.fromarray(images.decode(data, name))


def _key_of(data: bytes, name: str) -> str:
    """By the name's ending too, which tells some DICOM files."""
    return _digest(Path(name).suffix.lower().encode("utf-8", "replace") + b"\0", data)


def _digest(*parts: bytes) -> str:
    """What was refused before is refused again: whether burned-in names are allowed counts too."""
    digest = hashlib.sha256(b"\0".join([TRANSFORM, b"burned in\0" * burned_in_allowed()]))
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:40]


def decoded_images() -> DecodedImages | None:
    """Those of the environment's settings; None where they are off. InputError for a setting that means nothing."""
    return _open(*(os.environ.get(name, "") for name in (VARIABLE, f"{VARIABLE}_GB", f"{VARIABLE}_FORM")))


@functools.lru_cache(maxsize=4)
def _open(folder: str, gigabytes: str, form: str) -> DecodedImages | None:
    if folder == "off":
        return None
    try:
        most = float(gigabytes or 10)
    except ValueError:
        most = 0.0
    if not 0 < most < 1e6:
        raise InputError(f"{VARIABLE}_GB is {gigabytes!r} (expected a size in GB, more than 0)")
    if form not in ("", "raw", "lz4"):
        raise InputError(f"{VARIABLE}_FORM is {form!r} (expected raw or lz4)")
    place = Path(folder) if folder else cache_folder() / "images"
    return DecodedImages(PixelStore(place, int(most * 1e9), compress=form == "lz4"))
