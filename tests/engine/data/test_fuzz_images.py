"""Image files that are damaged, cut, or say that they are huge: an image or one line, no traceback, and bounded memory.

VESALIUS_FUZZ=10000 pytest tests/engine/data/test_fuzz_images.py
"""

import io
import os
import struct
import subprocess
import sys
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from engine.data.decoders.plain import plain_size
from engine.data.images import ImageError, count_pages, decode_image, is_turned
from engine.data.masks.pair import decode_mask
from engine.data.questions import load_questions
from engine.errors import InputError
from engine.files import write_json
from tests.conftest import ROOT
from tests.fuzz import FEWEST

NUMBER = int(os.environ.get("VESALIUS_FUZZ", 600))
MOST_MEMORY = 900  # MB more than before, whatever the files say: an image may have 179 megapixels
DICOM = ("CT_small.dcm", "MR_small_RLE.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm")
DICOM += ("image_dfl.dcm", "SC_rgb_small_odd.dcm", "examples_palette.dcm")
WORDS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\x00\x01\x86\xa0", b"\xff\x7f", b"\x00\x80")


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def seeds() -> list[tuple[str, bytes]]:
    """(a name with its ending, a whole file) of every kind."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 53, 3)).astype(np.uint8))
    turned = Image.Exif()
    turned[274] = 6
    deep = Image.fromarray((np.arange(37 * 53).reshape(37, 53) * 30).astype(np.uint16))
    frames = {"save_all": True, "append_images": [noise.rotate(90, expand=True), noise]}
    found = [("jpg", saved(noise, "JPEG")), ("jpg", saved(noise, "JPEG", progressive=True, exif=turned))]
    found += [("jpg", saved(noise.convert(mode), "JPEG")) for mode in ("L", "CMYK")]
    found += [("png", saved(noise.convert(mode), "PNG")) for mode in ("RGB", "L", "P", "RGBA", "1")] + [("png", saved(deep, "PNG"))]
    found += [("tif", saved(noise, "TIFF", compression=how)) for how in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    found += [("tif", saved(deep, "TIFF")), ("tif", saved(noise, "TIFF", **frames)), ("png", saved(noise, "PNG", **frames))]
    found += [("bmp", saved(noise.convert(mode), "BMP")) for mode in ("RGB", "P")] + [("gif", saved(noise, "GIF", **frames))]
    found += [("webp", saved(noise, "WEBP", lossless=lossless)) for lossless in (True, False)]
    for name in DICOM:
        with open(get_testdata_file(name), "rb") as file:
            found.append(("dcm", file.read()))
    return found


def damaged(number: int) -> tuple[str, bytes]:
    """File `number`: (ending, bytes)."""
    generator = np.random.default_rng(number)
    ending, whole = seeds()[number % len(seeds())]
    data, early = bytearray(whole), min(len(whole), 600)
    for _ in range(generator.integers(1, 4)):
        if len(data) < 8:
            break
        match generator.integers(0, 6):
            case 0:  # bytes changed anywhere
                for place in generator.integers(0, len(data), generator.integers(1, 20)):
                    data[place] = generator.integers(0, 256)
            case 1:  # bits flipped at the beginning
                for place in generator.integers(0, min(early, len(data)), 3):
                    data[place] ^= 1 << int(generator.integers(0, 8))
            case 2:
                del data[generator.integers(1, len(data)) :]
            case 3:  # a number in the header that is far too large, or none
                word, place = WORDS[generator.integers(0, len(WORDS))], generator.integers(0, min(early, len(data)))
                data[place : place + len(word)] = word
            case 4:  # a part twice
                start, end = sorted(generator.integers(0, len(data), 2))
                data[start:start] = data[start:end][:4000]
            case _:  # a part missing
                start = generator.integers(0, len(data))
                del data[start : start + generator.integers(1, 60)]
        data = data or bytearray(b"\0")
    return ending, bytes(data) if ending != "png" or number % 3 else with_sums(bytes(data))


def with_sums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, so that what is damaged is read."""
    place, parts = 8, [data[:8]]
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + length]
        parts += [data[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + length
    return b"".join(parts)


def png(width, height, bits, colours, content):
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)), (b"IDAT", content), (b"IEND", b""))
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(megabytes: int, wbits: int = 15) -> bytes:
    """A compressed stream of so many zeros, a hundredth of that long."""
    packer, part = zlib.compressobj(1, zlib.DEFLATED, wbits), bytes(1 << 20)
    return b"".join([*(packer.compress(part) for _ in range(megabytes)), packer.flush()])


def bombs() -> dict[str, bytes]:
    """Small files that would become large ones."""
    tiff = saved(Image.new("L", (8, 8)), "TIFF")
    with open(get_testdata_file("CT_small.dcm"), "rb") as file:
        dicom = file.read()
    with open(get_testdata_file("image_dfl.dcm"), "rb") as file:
        meta = file.read(1024)
    end = 144 + int.from_bytes(meta[140:144], "little")
    huge = struct.pack("<HHI", 0x0008, 0x0008, 0)[:4]
    return {
        "a.png": png(200_000, 200_000, 8, 2, zeros(8)),
        "more-than-its-header.png": png(16, 16, 8, 2, zeros(100)),
        "deep.png": png(60_000, 60_000, 16, 0, zeros(8)),
        "a.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "a.gif": b"GIF89a"
        + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0)
        + bytes(6)
        + b","
        + bytes(4)
        + b"\xff" * 4
        + b"\0\2\0;",
        "a.tif": tiff.replace(struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, 70_000)).replace(
            struct.pack("<HHII", 257, 4, 1, 8), struct.pack("<HHII", 257, 4, 1, 70_000)
        ),
        "a.dcm": dicom.replace(b"\x28\0\x10\0US\2\0\x80\0", b"\x28\0\x10\0US\2\0\xff\xff").replace(
            b"\x28\0\x11\0US\2\0\x80\0", b"\x28\0\x11\0US\2\0\xff\xff"
        ),
        "deflated.dcm": meta[:end] + zeros(400, -15),
        "nothing.dcm": b"\0" * 128 + b"DICM" + huge,
    }


def line_of(error: InputError) -> str:
    line = str(error)
    assert "\n" not in line and "Traceback" not in line and 10 < len(line) < 500, line
    return line


def look(data: bytes, name: str) -> bool:
    """Whether it is an image; every reader of images is asked."""
    count_pages(data), is_turned(data), plain_size(data)
    for decode in (decode_mask, decode_image):
        try:
            image = decode(data, name)
        except ImageError as error:
            assert line_of(error).startswith(f"{name}: ")
            image = None
    assert image is None or image.mode == "RGB" and min(image.size) > 0 and image.tobytes()
    return image is not None


def peak_mb() -> float:
    """Of this process, since it began."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def run(number: int) -> None:
    """In a process of its own, whose memory tells."""
    import warnings

    warnings.simplefilter("ignore")  # Pillow's and pydicom's, of which there is one a file
    for ending, data in seeds():
        assert look(data, f"whole.{ending}"), ending
    before, images = peak_mb(), 0
    for i in range(number):
        ending, data = damaged(i)
        images += look(data, f"{i}.{ending}")
    assert not look(damaged(5740)[1], "circle.tif")  # its second page says that it is followed by itself
    for name, data in bombs().items():
        assert look(data, name) == (name == "more-than-its-header.png"), name
    print(f"{number} files, {images} images, {peak_mb() - before:.0f} MB")
    assert number / 20 < images < number and peak_mb() - before < MOST_MEMORY


def test_fuzz_of_image_files():
    pytest.importorskip("resource", reason="memory is asked of POSIX")
    command = [sys.executable, "-c", f"from tests.engine.data.test_fuzz_images import run; run({NUMBER})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 + 2 * max(NUMBER, FEWEST // 10))
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    print(done.stdout)


def test_bad_files_are_left_out_and_listed(tmp_path, monkeypatch):
    """With `--on_bad_row skip`: what is left opens."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    rows = []
    for i in range(120):
        ending, data = damaged(i)
        (tmp_path / f"{i}.{ending}").write_bytes(data)
        rows.append({"image": f"{i}.{ending}", "problem": "Which? A) CT, B) MRI", "solution": "A"})
    found = load_questions(write_json(tmp_path / "q.json", rows), on_bad_row="skip")
    assert 10 < len(found) and len(found) + len(found.skipped) == 120 and len(found.skipped) > 10
    assert all(found[i]["images"][0].mode == "RGB" for i in range(len(found)))
    for line in found.skipped:
        assert "\n" not in line and "q.json: row " in line and "expected a whole PNG" in line


def test_two_hundred_megapixels_are_refused_in_one_line(tmp_path):
    """20,000 x 10,000 pixels, whole: half a megabyte as a file."""
    packer = zlib.compressobj(1)
    content = b"".join([*(packer.compress(bytes(20_001)) for _ in range(10_000)), packer.flush()])
    (tmp_path / "large.png").write_bytes(png(20_000, 10_000, 8, 0, content))
    with pytest.raises(InputError) as error:
        load_questions(
            write_json(tmp_path / "q.json", [{"image": "large.png", "problem": "Which? A) CT, B) MRI", "solution": "A"}])
        )
    assert "large.png" in line_of(error.value) and "200000000 pixels" in str(error.value)
