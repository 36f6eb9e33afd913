"""Image files are decoded once, in this run and in later ones, and give what they give without a cache."""

import numpy as np
import pytest
from PIL import Image

from engine.data.images import ImageError, decode_pixels, open_image
from engine.data.loaders import decoded
from engine.data.loaders.decoded import VARIABLE, decode_once, open_decoded
from engine.errors import InputError


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """The names of the images that were decoded; the cache is a folder of the test's own."""
    names = []

    def decode(data, name):
        names.append(name)
        return decode_pixels(data, name)

    monkeypatch.setattr(decoded, "decode_pixels", decode)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return names


def picture(path, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3)).astype(np.uint8)).save(path)
    return path


def forget():
    """As a new process begins."""
    decoded._open.cache_clear()


@pytest.mark.parametrize("form", ["raw", "lz4"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_an_image_is_decoded_once_and_is_the_same(tmp_path, counted, monkeypatch, form, name):
    monkeypatch.setenv(f"{VARIABLE}_FORM", form)
    path = picture(tmp_path / name)
    opened = [open_decoded(path) for _ in range(3)]
    forget()
    opened += [open_decoded(path), decode_once(path.read_bytes(), "b" + name)]
    assert counted == [str(path)]
    for image in opened:
        assert image.mode == "RGB" and image.tobytes() == open_image(path).tobytes()


def test_the_same_content_elsewhere_is_known_and_a_changed_file_is_not(tmp_path, counted):
    path, other = picture(tmp_path / "a.png"), tmp_path / "copy.png"
    other.write_bytes(path.read_bytes())
    open_decoded(path), open_decoded(other)
    assert len(counted) == 1
    picture(path, seed=1)
    assert open_decoded(path).tobytes() == open_image(path).tobytes() and len(counted) == 2


def test_off_keeps_nothing(tmp_path, counted, monkeypatch):
    monkeypatch.setenv(VARIABLE, "off")
    path = picture(tmp_path / "a.png")
    assert open_decoded(path).tobytes() == decode_once(path.read_bytes(), "a.png").tobytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_errors_are_those_of_the_file_and_nothing_is_kept_of_it(tmp_path, counted):
    (tmp_path / "a.png").write_bytes(b"\x89PNG no")
    for path, words in ((tmp_path / "a.png", "expected a whole PNG"), (tmp_path / "none.png", "no such image file")):
        with pytest.raises(ImageError, match=words) as error:
            open_decoded(path)
        assert str(path) in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("name", "value"), [("_GB", "much"), ("_GB", "-1"), ("_GB", "nan"), ("_FORM", "zip")])
def test_a_setting_that_means_nothing_is_one_line(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(VARIABLE + name, value)
    with pytest.raises(InputError, match=f"{VARIABLE}{name} is '{value}'"):
        open_decoded(picture(tmp_path / "a.png"))
