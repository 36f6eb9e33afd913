"""Slices that were segmented already, so that a run which was ended goes on where it was: FOLDER/<label>-<slice>.npz.

The folder lies in the cache and is called by a hash of all that its masks depend on: no name, no identifier, and another volume,
model or prompt has another one. It goes when the whole is written.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.volumes.propagate import Prompt
from engine.files import cache_folder, write_whole

logger = logging.getLogger(__name__)
Ask = Callable[[int, Prompt], tuple[np.ndarray, float]]  # slice, prompt -> levels [H, W] uint8, score


class FinishedSlices:
    """Answers of a model, each asked for once."""

    def __init__(self, voxels: np.ndarray, settings: Any):
        """`settings`: in JSON's types, whatever else the masks depend on."""
        digest = hashlib.sha256(json.dumps([voxels.shape, str(voxels.dtype), settings], sort_keys=True).encode())
        digest.update(np.ascontiguousarray(voxels).data)
        self.folder = cache_folder() / "segmented" / digest.hexdigest()[:40]
        self.reused = 0

    def ask(self, label: int, ask: Ask) -> Ask:
        """`ask` of one label, which is asked only what it did not answer before."""

        def answer(index: int, prompt: Prompt) -> tuple[np.ndarray, float]:
            path = self.folder / f"{label:03d}-{index:05d}.npz"
            box = np.array(prompt.box if prompt.box is not None else (), np.float64)
            before = _read(path, box)
            if before is not None:
                self.reused += 1
                return before
            levels, score = ask(index, prompt)
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # masks of patients
            buffer = io.BytesIO()
            np.savez_compressed(buffer, levels=levels, score=score, box=box)
            write_whole(path, buffer.getvalue())
            return levels, score

        return answer

    def remove(self) -> None:
        """Once the whole is written."""
        if self.reused:
            logger.info("%d slices were segmented by a run before this one", self.reused)
        shutil.rmtree(self.folder, ignore_errors=True)


def stamp_of(checkpoint: str | Path | None) -> list[Any]:
    """Names, sizes and times of a checkpoint's files: what tells that it is another one."""
    if checkpoint is None:
        return []
    path = Path(checkpoint)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return [[str(file), status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()]]


def _read(path: Path, box: np.ndarray) -> tuple[np.ndarray, float] | None:
    """None where there is none that is whole and of this box."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if not np.array_equal(stored["box"], box):
                return None
            return stored["levels"], float(stored["score"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
