"""The bench of opening images: every way is looked at before it is timed, and its line has what its documents promise."""

import importlib.util

import pytest
from PIL import Image

from bench import loader as bench
from engine.errors import InputError


def test_every_way_is_measured(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.effect_noise((64, 48), 40 + i).convert("RGB").save(tmp_path / "images" / f"{i}.jpg")
    result = bench.main(["--data", str(tmp_path), "--images", "2", "--repetitions", "2"])
    names = {"pillow", "first", "cached", "compressed", "off"} | ({"dali"} if importlib.util.find_spec("nvidia") else set())
    assert result["images"] == 2 and set(result["milliseconds"]["png"]) == set(result["milliseconds"]["jpeg"]) == names
    ratios = ["png_first_vs_pil", "png_cached_vs_pil", "jpeg_first_vs_pil", "cached_compressed_vs_pil"]
    ratios += ["png_dali_vs_pil", "jpeg_dali_vs_pil"] if "dali" in names else []
    assert all(result[name] > 0 for name in ratios)


def test_other_pixels_end_it_and_no_images_are_one_line(tmp_path, monkeypatch):
    Image.effect_noise((64, 48), 40).convert("RGB").save(tmp_path / "a.png")
    monkeypatch.setattr(bench, "by_pillow", lambda file: [])
    with pytest.raises(InputError, match="cached gives other pixels of a.png than Pillow"):
        bench.measure([tmp_path / "a.png"], tmp_path / "cache", 1)
    with pytest.raises(InputError, match="expected the mini data set"):
        bench.main(["--data", str(tmp_path)])
