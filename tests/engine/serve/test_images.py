"""Images in C++ against those in Python: decoded, turned, scaled and brought into a model's square."""

import json
import os
import random
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from engine.data.images import open_image
from models.sam.frame import Frame
from models.sam.sam import normalised
from tests.engine.serve.pictures import real_images, write_pictures
from tests.engine.serve.small_segmenter import SIZE, SmallSegmenter


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    files = write_pictures(tmp_path_factory.mktemp("pictures"))
    return files | {path.name: path for path in real_images()[::4]}


@pytest.fixture(scope="module")
def probe(binaries):
    def run(*arguments):
        return subprocess.run([binaries / "image_probe", *map(str, arguments)], capture_output=True)

    return run


def read(probed):
    assert probed.returncode == 0, probed.stderr
    size, _, content = probed.stdout.partition(b"\n")
    return *map(int, size.split()), content


def test_pixels_are_those_of_python(probe, pictures):
    for name, file in pictures.items():
        width, height, content = read(probe(file))
        expected = np.asarray(open_image(file))
        assert (height, width, 3) == expected.shape, name
        # Inks are turned into light by rounding once here and twice there.
        difference = np.abs(np.frombuffer(content, np.uint8).reshape(expected.shape).astype(int) - expected)
        assert difference.max() <= (1 if name == "ink.jpg" else 0), name


@pytest.mark.parametrize("normalisation, fit", [("min_max", "corner"), ("imagenet", "corner"), ("imagenet", "stretch_nearest")])
def test_the_models_input_is_within_one_level_of_pythons(probe, pictures, normalisation, fit):
    how = json.dumps(SmallSegmenter(normalisation, fit).exported().facts["preprocessing"])
    for name, file in pictures.items():
        if name == "ink.jpg":  # whose pixels already differ by one
            continue
        *_, content = read(probe(file, how))
        pixels = np.asarray(open_image(file))
        frame = Frame.fit(pixels.shape[:2], SIZE, fit)
        expected = frame.pad(normalised(frame.resize(pixels), normalisation)).numpy()
        # Resizing is bit for bit PIL's, so that nothing is left but the rounding of float32.
        np.testing.assert_allclose(np.frombuffer(content, np.float32).reshape(expected.shape), expected, atol=1e-5, err_msg=name)


def test_an_image_that_is_not_whole_is_one_line(probe, pictures, tmp_path):
    file = tmp_path / "image"
    for name in ("rgb.png", "palette.png", "deep.png", "subsampled.jpg", "progressive.jpg", "ink.jpg"):
        whole = pictures[name].read_bytes()
        for length in (0, 3, 20, len(whole) // 2, len(whole) - 40):
            file.write_bytes(whole[:length])
            probed = probe(file)
            assert probed.returncode == 2 and probed.stderr.count(b"\n") == 1, (name, length)
            assert b"expected a whole PNG or JPEG file" in probed.stderr


def test_what_is_no_png_or_jpeg_is_refused(probe, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "image.bmp")
    assert b"neither PNG nor JPEG" in probe(tmp_path / "image.bmp").stderr
    assert b"cannot be read: No such file" in probe(tmp_path / "none.png").stderr
    assert b"not a file" in probe(tmp_path).stderr


@pytest.mark.parametrize("width, height", [(60000, 60000), (1 << 30, 1)])
def test_an_image_of_too_many_pixels_is_refused_by_its_header_before_there_is_room_for_it(binaries, tmp_path, width, height):
    small = tmp_path / "small.png"
    Image.new("L", (3, 3)).save(small)
    content = bytearray(small.read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    small.write_bytes(content)
    probed = subprocess.Popen([binaries / "image_probe", small], stderr=subprocess.PIPE)
    said = probed.stderr.read()
    *_, used = os.wait4(probed.pid, 0)
    assert f"{width} x {height} pixels are more than".encode() in said and used.ru_maxrss < 1 << 19  # kilobytes: half of a row


def test_changed_bytes_are_an_image_or_one_line(probe, pictures, tmp_path):
    rng, file = random.Random(3), tmp_path / "image"
    for name in ("rgb.png", "palette.png", "deep.png", "turned6.jpg", "progressive.jpg", "ink.jpg"):
        whole = pictures[name].read_bytes()
        for _ in range(25):
            changed = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            file.write_bytes(changed)
            probed = probe(file)
            assert probed.returncode == 0 or (probed.returncode == 2 and probed.stderr.count(b"\n") == 1), (name, probed)
