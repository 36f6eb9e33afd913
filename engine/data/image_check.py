"""Each distinct image of a data set is opened once before a run starts; one that opened is not again until its file changes."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from engine.data.images import MISSING, ImageError
from engine.files import cache_folder, write_whole
from engine.progress import progress

MAX_ASPECT = 200  # a longer side of so many shorter ones is all that Qwen-VL resizes


class ImageHandle(Protocol):
    """An image, or images that belong together, of a row: not opened yet."""

    @property
    def key(self) -> str:
        """Its name, different for each."""

    def stamp(self) -> list[int]:
        """Sizes and times of its files, which tell that they changed. OSError or ValueError if one cannot be there."""

    def open(self) -> Any:
        """What is in it. ImageError if that cannot be used."""


def find_bad_images(images: Sequence[ImageHandle], root: Path, stop_at_first: bool = False) -> dict[str, str]:
    """{key: reason} of the images that cannot be opened; the first one found only, if `stop_at_first`.

    The stamps of those that opened are kept in the cache folder as `checked_images/<hash of root>.json`, {key: stamp}; an image
    whose stamp is there is not opened again.
    """
    remembered = cache_folder() / "checked_images" / f"{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.json"
    passed, bad = _recall(remembered), {}
    unchecked: dict[str, tuple[ImageHandle, list[int]]] = {}
    for image in images:
        try:
            stamp = image.stamp()
        except (OSError, ValueError):
            bad[image.key] = MISSING
            if stop_at_first:
                return bad
            continue
        if passed.get(image.key) != stamp:
            unchecked[image.key] = (image, stamp)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        reasons = pool.map(_reason, [image for image, _ in unchecked.values()])
        bar = progress(unchecked.items(), desc="checking images", unit="image", delay=2)
        for (key, (_, stamp)), reason in zip(bar, reasons, strict=True):
            if reason is None:
                passed[key] = stamp
                continue
            bad[key] = reason
            if stop_at_first:
                break
    finally:
        pool.shutdown(cancel_futures=True)
        if unchecked:
            _remember(remembered, passed)
    return bad


def _reason(image: ImageHandle) -> str | None:
    """Why the image cannot be opened or shown to a model, or None."""
    try:
        opened = image.open()
    except ImageError as error:
        return error.reason
    if isinstance(opened, Image.Image) and max(opened.size) > MAX_ASPECT * min(opened.size):
        return f"a strip of {opened.width} x {opened.height} pixels, one side more than {MAX_ASPECT} times the other"
    return None


def _recall(path: Path) -> dict[str, list[int]]:
    try:
        passed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return passed if isinstance(passed, dict) else {}


def _remember(path: Path, passed: dict[str, list[int]]) -> None:
    try:
        write_whole(path, json.dumps(passed))
    except OSError:  # a cache that cannot be written costs time, nothing else
        pass
