"""Every distinct image of a data set is decoded once before a run starts; files that passed are remembered by size and time."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from engine.data.images import MISSING, ImageError
from engine.files import cache_folder, write_whole
from engine.processes import rank


def find_bad_images(images: list, root: Path, stop_at_first: bool = False) -> dict[str, str]:
    """{key: reason} of the images that cannot be opened; the first one found only, if `stop_at_first`.

    `images` have `key`, `stamp()` and `open()` (see `engine.data.sources`). `root` names the list of remembered images:
    `checked_images/<hash>.json` in the cache folder, {key: stamp}.
    """
    remembered = cache_folder() / "checked_images" / f"{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.json"
    passed, bad, unchecked = _recall(remembered), {}, {}
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
        bar = tqdm(unchecked.items(), desc="checking images", unit="image", delay=2, disable=rank() != 0)
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


def _reason(image) -> str | None:
    """Why the image cannot be opened, or None."""
    try:
        image.open()
    except ImageError as error:
        return error.reason
    return None


def _recall(path: Path) -> dict[str, list[int]]:
    try:
        passed = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return passed if isinstance(passed, dict) else {}


def _remember(path: Path, passed: dict[str, list[int]]) -> None:
    try:
        write_whole(path, json.dumps(passed))
    except OSError:  # a cache that cannot be written costs time, nothing else
        pass
