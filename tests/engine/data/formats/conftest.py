"""A folder of images to name in rows, the working directory of the test, and a cache of its own."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    Image.new("RGB", (8, 6), (90, 0, 0)).save("a.png")
    return tmp_path / "data"
