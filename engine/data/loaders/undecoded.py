"""Plain JPEG and PNG files that are not decoded yet, for a loader that does that elsewhere."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from engine.data.decoders.plain import plain_size
from engine.data.loaders.decoded import decode_once


@dataclass(frozen=True)
class Undecoded:
    """A whole file of which only the header has been read; `size` (width, height) as of a PIL image."""

    data: bytes
    name: str
    size: tuple[int, int]

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def open(self) -> Image.Image:
        """As PIL RGB; ImageError, naming the file, where it is damaged."""
        return decode_once(self.data, self.name)


def read_undecoded(handle: Any) -> Undecoded | Image.Image:
    """An image of a row by its handle, whose `read()` gives name and bytes: PIL RGB if it is not plain. Errors as of `open()`."""
    _, data = handle.read()
    size = plain_size(data)
    return Undecoded(data, handle.key, (size[1], size[0])) if size and min(size) else handle.open()


def as_picture(image: Undecoded | Image.Image) -> Image.Image:
    """PIL RGB of either."""
    return image.open() if isinstance(image, Undecoded) else image
