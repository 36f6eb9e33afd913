"""Starter questions: which modality is this? Asked about crops of the real images that pydicom, pydicom-data and scikit-image ship.

Six modalities, 1440 training and 300 test questions in Med-R1's format (`train.json`, `test.json`, `images/`), no network.
Each source image is cut into 2 x 2 cells: training crops lie in the upper left and lower right cells, test crops in the other
two, and cells end `GAP` pixels before the cut, so no pixel of a source serves both. `crops.json` says where each crop is from.
The four options are the right modality and three others in random order; file names say nothing, and no model sees them.
It is a task to start with, not a benchmark: a modality has one to three sources, so train and test regions look alike.
"""

import json
from collections.abc import Iterator
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.starter.folder import starter_folder
from engine.errors import InputError
from engine.files import write_json

VERSION, GROUNDS = 3, 2  # raise one with any change of what is built
SIDE = 112  # pixels of a crop: 16 visual tokens of Qwen2.5-VL
GAP = 4  # pixels between a cell and the cut, on either side
PER_MODALITY = {"train": 240, "test": 50}
SEED = 2025

# file -> the part of it that is picture (left, upper, right, lower; fractions), without burnt-in text and blank borders
WHOLE = (0.0, 0.0, 1.0, 1.0)
SOURCES = {
    "CT": {"693_UNCR.dcm": (0.18, 0.05, 0.85, 0.98), "CT_small.dcm": WHOLE},
    "MRI": {"MR2_UNCR.dcm": (0.1, 0.15, 0.75, 0.88), "MR-SIEMENS-DICOM-WithOverlays.dcm": (0.02, 0.2, 0.96, 0.8)},
    "X-Ray": {"RG1_UNCR.dcm": (0.02, 0.03, 0.9, 0.98), "RG3_UNCR.dcm": (0.3, 0.0, 0.7, 1.0)},
    "Ultrasound": {
        "gdcm-US-ALOKA-16.dcm": (0.1, 0.14, 0.92, 0.72),
        "color3d_jpeg_baseline.dcm": (0.22, 0.08, 0.72, 0.85),
        "US1_UNCR.dcm": (0.06, 0.2, 0.9, 0.62),
    },
    "Fundus photography": {"retina.jpg": (0.12, 0.12, 0.88, 0.88)},
    "Microscopy": {"ihc.png": WHOLE, "cell.png": (0.56, 0.36, 1.0, 0.78)},
}
WIDER = {"MR2_UNCR.dcm": (0.1, 0.12, 1.0, 0.92), "cell.png": WHOLE}  # dark corners and one cell's surroundings included
PLAIN, PLAINER = 4.5, 4.0  # the standard deviation of grey values that a crop is above: of questions, of grounds
QUESTIONS = [
    "What imaging technique is employed for obtaining this image?",
    "Which imaging modality was used to acquire this image?",
    "What type of medical imaging is shown here?",
    "Which modality does this image come from?",
    "How was this medical image obtained?",
    "What kind of scan is this?",
]


def build_starter_data(folder: str | Path | None = None) -> Path:
    """Make the starter questions in `folder`, by default in the cache, and return it; one that is there already is kept.

    The folder appears whole or not at all, also when several processes make it at once.
    """
    return starter_folder(folder, f"starter-{VERSION}", "test.json", partial(_write_questions, {}, PLAIN))


def build_grounds(folder: str | Path | None = None) -> Path:
    """The same from `WIDER` parts, on some of which there is little to see: what the lesions of other starter data are drawn on."""
    return starter_folder(folder, f"starter-{GROUNDS}", "test.json", partial(_write_questions, WIDER, PLAINER))


def _write_questions(other_parts: dict[str, tuple[float, float, float, float]], plain: float, folder: Path) -> None:
    (folder / "images").mkdir()
    rng = np.random.default_rng(SEED)
    pictures = {
        modality: {name: (read_source(name), other_parts.get(name, part)) for name, part in parts.items()}
        for modality, parts in SOURCES.items()
    }
    crops = {}
    for split, count in PER_MODALITY.items():
        modalities = rng.permutation([modality for modality in SOURCES for _ in range(count)])
        streams = {modality: _crops(pictures[modality], split, plain, rng) for modality in SOURCES}
        rows = []
        for index, modality in enumerate(modalities.tolist()):
            name = f"images/{split}_{index:04d}.png"
            crop, source, box = next(streams[modality])
            crop.save(folder / name, compress_level=1)
            crops[name] = {"split": split, "source": source, "box": box}
            rows.append({"image": name, **ask(modality, rng)})
        write_json(folder / f"{split}.json", rows)
    write_json(folder / "crops.json", crops)


def ask(modality: str, rng: np.random.Generator) -> dict:
    """A question whose answer is `modality`: a row without its image."""
    others = [other for other in SOURCES if other != modality]
    options = rng.permutation([modality, *rng.choice(others, 3, replace=False)]).tolist()
    listed = ", ".join(f"{letter}){option}" for letter, option in zip("ABCD", options, strict=True))
    return {
        "problem": f"{rng.choice(QUESTIONS)} {listed}",
        "solution": f"<answer> {'ABCD'[options.index(modality)]} </answer>",
        "modality": modality,
        "question_type": "Modality Recognition",
    }


def cells(width: int, height: int, part: tuple[float, float, float, float], split: str) -> list[tuple[int, int, int, int]]:
    """The two cells (left, upper, right, lower; pixels, ends excluded) of a source that may be cropped for `split`."""
    left, right = round(part[0] * width), round(part[2] * width)
    upper, lower = round(part[1] * height), round(part[3] * height)
    x, y = (left + right) // 2, (upper + lower) // 2
    if split == "train":
        return [(left, upper, x - GAP, y - GAP), (x + GAP, y + GAP, right, lower)]
    return [(x + GAP, upper, right, y - GAP), (left, y + GAP, x - GAP, lower)]


def _crops(pictures: dict, split: str, plain: float, rng: np.random.Generator) -> Iterator[tuple[Image.Image, str, list[int]]]:
    """Endless random square crops with something on them, sources and cells in turn -> (RGB of `SIDE`, source, box)."""
    while True:
        for source, (picture, part) in pictures.items():
            for left, upper, right, lower in cells(picture.width, picture.height, part, split):
                while True:
                    size = int(min(right - left, lower - upper) * rng.uniform(0.5, 1.0))
                    x, y = int(rng.integers(left, right - size + 1)), int(rng.integers(upper, lower - size + 1))
                    crop = picture.crop((x, y, x + size, y + size)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                    grey = np.asarray(crop.convert("L"))
                    if grey.std() > plain and (grey > 20).mean() > 0.3:
                        break
                yield crop, source, [x, y, x + size, y + size]


def read_source(name: str) -> Image.Image:
    """One of the files of `SOURCES` as RGB."""
    if name.endswith(".dcm"):
        return _read_dicom(name)
    with as_file(files("skimage.data") / name) as path, Image.open(path) as image:
        return image.convert("RGB")


def _read_dicom(name: str) -> Image.Image:
    """The middle frame as RGB, grey values between their 0.5th and 99.5th percentile."""
    import pydicom  # here: it takes a third of a second, and the starter data are made once
    from pydicom.data import get_testdata_file
    from pydicom.pixels import apply_color_lut, pixel_array

    path = get_testdata_file(name, download=False)
    if path is None:
        raise InputError(f"{name}: not found; the starter data need the package pydicom-data (pip install pydicom-data)")
    dataset = pydicom.dcmread(path)
    frames = int(dataset.get("NumberOfFrames") or 1)
    pixels = pixel_array(path, index=frames // 2) if frames > 1 else dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    if pixels.dtype == np.uint8:
        return Image.fromarray(pixels).convert("RGB")
    low, high = np.percentile(pixels, [0.5, 99.5])
    grey = ((pixels - low) / (high - low)).clip(0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # bone is stored dark
        grey = 1 - grey
    return Image.fromarray((grey * 255).astype(np.uint8)).convert("RGB")


def load_crops(folder: str | Path) -> dict[str, dict]:
    """What each image of the starter data was cut from: {image: {split, source, box}}, boxes in pixels of the source."""
    return json.loads((Path(folder) / "crops.json").read_text(encoding="utf-8"))
