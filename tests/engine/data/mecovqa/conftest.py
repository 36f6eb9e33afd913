"""A folder in MeCoVQA's layout: three images, masks of 0 and 255, of 0 and 1, of another size, and an empty one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = (24, 20)
CT = "ct_00--CAD_PE--001--x_0125"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "SAMed2Dv1"
    for name in ("images", "masks", "train", "test"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (CT, "x_ray--covid--7--2d_none", "photo"):
        Image.fromarray(rng.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)).save(folder / "images" / f"{name}.png")
    square = np.zeros(SIZE[::-1], np.uint8)
    square[:10, :12] = 1
    large = square.repeat(2, 0).repeat(2, 1)
    masks = {"one": square, "full": square * 255, "large": large * 255, "empty": square * 0, "odd": np.ones((20, 20), np.uint8)}
    for name, mask in masks.items():
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    Image.fromarray(square * 255).save(folder / "masks" / f"{CT}--0001_000.png")
    return folder
