"""Starter data for Uni-MedVLM: captions, questions, regions and masks of drawn lesions, in the published files of MeCoVQA.

    captions.jsonl, captions_test.jsonl
    train/MeCoVQA-{Complex,Region,Grounding}.json
    test/MeCoVQA_{Complex_VQA,Region_VQA,Region_Closed_VQA,Grounding}_test.json
    images/, masks/, SAMed2D_v1.json, SAMed2D_v1_class_mapping_id.json      by SA-Med2D-20M's names

Each image is a crop of a real one (`engine.data.starter.questions.build_grounds`; training and test crops share no pixel) with one
lesion, brighter or darker than what lies around it, and there is one row of each kind about it. It is a task to start with, not a
benchmark. As in the published files, some names of images lack their `.png`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.mecovqa.samed2d import CLASSES, INDEX
from engine.data.positions import locate
from engine.data.starter.folder import starter_folder
from engine.data.starter.masked_questions import blob, draw_lesion
from engine.data.starter.questions import GROUNDS, QUESTIONS, build_grounds
from engine.files import as_json, json_line, write_json, write_whole

VERSION = 3  # raise it with any change of what is built
COUNTS = {"train": 600, "test": 120}
SEED = 2027
DATASET = "starter"
PREFIXES = {  # a modality -> what SA-Med2D would put before its names, and behind them
    "CT": ("ct_00", "x_{:04d}"),
    "MRI": ("mr_t1", "z_{:04d}"),
    "X-Ray": ("x_ray", "2d_none"),
    "Ultrasound": ("ultrasound_00", "2d_none"),
    "Fundus photography": ("fundus_photography", "2d_none"),
    "Microscopy": ("microscopy_00", "2d_none"),
}
CLASS_IDS = {"bright lesion": "0001", "dark lesion": "0002", "normal tissue": "0003"}
NAMES = {"CT": "a CT image", "MRI": "an MRI image", "X-Ray": "an X-ray image", "Ultrasound": "an ultrasound image"}
NAMES |= {"Fundus photography": "a fundus photograph", "Microscopy": "a microscopy image"}
GROUNDING = [
    "Could you segment out the lesion in this image?",
    "Please generate a mask that segments the lesion in this image.",
    "Segment the lesion.",
]
PLAIN = (70, 170)  # the brightness that a region of normal tissue has, where there is such tissue
DARK, TRIES = 0.85, 8  # how often a dark lesion is wanted: half of the images have room for bright ones alone
NO_SUFFIX = 10  # of so many rows one names its image without .png

Row = dict[str, Any]


def build_starter_unimed(folder: str | Path | None = None) -> Path:
    """Make the folder, by default in the cache, and return it; one that is there already is kept."""
    return starter_folder(folder, f"starter-unimed-{VERSION}-{GROUNDS}", INDEX, _write)


def _write(root: Path) -> None:
    crops, rng = build_grounds(), np.random.default_rng(SEED)
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    index: dict[str, list[str]] = {}
    for split, count in COUNTS.items():
        questions = json.loads((crops / f"{split}.json").read_text(encoding="utf-8"))[:count]
        cases = [_Case(root, split, i, question, crops, rng) for i, question in enumerate(questions)]
        index |= {case.image: case.masks for case in cases}
        for name, of_case in FILES[split].items():
            rows = [of_case(case) for case in cases]
            rows = [row for row in rows if row is not None]
            lines = b"".join(map(json_line, rows))
            write_whole(root / name, lines if name.endswith(".jsonl") else as_json(rows))
    write_json(root / CLASSES, {DATASET: CLASS_IDS})
    write_json(root / INDEX, index)


class _Case:
    """An image with its lesion, its region of normal tissue, and what is asked about them; its files are written."""

    def __init__(self, root: Path, split: str, number: int, question: Row, crops: Path, rng: np.random.Generator) -> None:
        with Image.open(crops / question["image"]) as opened:
            crop = np.asarray(opened.convert("RGB"), dtype=np.float32)[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
        pixels, lesion, self.shade = draw_shade(crop, "dark" if rng.random() < DARK else "bright", rng)
        normal = draw_normal(pixels, lesion, rng)
        prefix, at = PREFIXES[question["modality"]]
        self.number, self.modality, self.rng = number, question["modality"], rng
        self.name = f"{prefix}--{DATASET}--{split}_{number:04d}--{at.format(number)}"
        self.place = locate(lesion)[0].place
        self.image = f"images/{self.name}.png"
        self.masks = [self._mask_name(f"{self.shade} lesion"), self._mask_name("normal tissue")]
        Image.fromarray(pixels).save(root / self.image, compress_level=1)
        for name, mask in zip(self.masks, (lesion, normal), strict=True):  # SA-Med2D has masks of 0 and 1, and of 0 and 255
            Image.fromarray(mask.astype(np.uint8) * (255 if number % 2 else 1)).save(root / name)

    def _mask_name(self, of: str) -> str:
        return f"masks/{self.name}--{CLASS_IDS[of]}_000.png"

    @property
    def spot(self) -> str:
        """Where the lesion lies, in words."""
        words = self.place.replace("top", "upper").replace("bottom", "lower")
        return f"in the {words}"

    def row(self, question: str, answer: str, answer_type: str | None = None) -> Row:
        image = self.image.removesuffix(".png") if self.number % NO_SUFFIX == 0 else self.image
        turns = [("human", f"<image>\n{question}"), ("gpt", answer)]
        row: Row = {"id": self.name, "image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}
        return row if answer_type is None else row | {"answer_type": answer_type}

    def choose(self, texts: list[str]) -> str:
        return texts[int(self.rng.integers(len(texts)))]


def draw_shade(crop: np.ndarray, wanted: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
    """(pixels, lesion, its shade) of `draw_lesion`, drawn again until it is as wanted; not every image has room for both shades."""
    for _ in range(TRIES):
        pixels, lesion = draw_lesion(crop, rng)
        shade = "bright" if pixels[lesion].mean() > 127 else "dark"
        if shade == wanted:
            break
    return pixels, lesion, shade


def draw_normal(pixels: np.ndarray, lesion: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A blob [H, W] (bool) beside the lesion, on tissue that is neither bright nor dark where there is any; pixels [H, W, 3]."""
    height, width = lesion.shape
    brightness = pixels.mean(-1)
    found: list[tuple[float, np.ndarray]] = []
    for _ in range(40):
        radius = float(rng.uniform(0.1, 0.16) * height)
        mask = blob((height, width), rng.uniform(radius, (height - radius, width - radius)), radius, rng)
        if (mask & lesion).any():
            continue
        mean = float(brightness[mask].mean())
        found.append((max(PLAIN[0] - mean, mean - PLAIN[1], 0.0), mask))
        if found[-1][0] == 0:
            break
    return min(found, key=lambda pair: pair[0])[1]


def _caption(case: _Case) -> Row:
    shown = NAMES[case.modality]
    caption = f"{shown[0].upper()}{shown[1:]} with a {case.shade} lesion {case.spot}."
    return {"id": case.name, "image": case.image, "caption": f"<image>\n{caption}", "source": DATASET}


def _complex(case: _Case) -> Row:
    """By turns closed (modality, brightness, yes or no) and open (place, finding)."""
    turn, lesion = case.number % 5, f"a {case.shade} lesion"
    if turn == 0:
        return case.row(case.choose(QUESTIONS), case.modality, "CLOSED")
    if turn == 1:
        asked = ["Is the lesion bright or dark?", "Is the lesion darker or brighter than the tissue around it: bright or dark?"]
        return case.row(case.choose(asked), case.shade, "CLOSED")
    if turn == 2:
        side = case.choose(["bright", "dark"])
        return case.row(f"Does this image show a {side} lesion?", "yes" if side == case.shade else "no", "CLOSED")
    if turn == 3:
        return case.row(case.choose(["Where is the lesion?", "In which part of the image does the lesion lie?"]), case.spot, "OPEN")
    asked = ["What does this image show?", "What is the finding, and where is it?"]
    return case.row(case.choose(asked), f"{lesion} {case.spot}", "OPEN")


def _region(case: _Case) -> Row:
    """By turns what is there (open), and whether it is a lesion (closed); half of the regions are lesions."""
    is_lesion = case.number % 4 < 2
    region = f"<region>{case.masks[0 if is_lesion else 1]}</region>"
    if case.number % 2:
        return case.row(f"Is there a lesion in {region}?", "yes" if is_lesion else "no", "CLOSED")
    asked = [f"What is in {region}?", f"What does {region} show?"]
    return case.row(case.choose(asked), f"a {case.shade} lesion" if is_lesion else "normal tissue", "OPEN")


def _grounding(case: _Case) -> Row:
    return case.row(case.choose(GROUNDING), f"<SEG> <mask>{case.masks[0]}</mask>")


def _open_region(case: _Case) -> Row | None:
    return None if case.number % 2 else _region(case)


def _closed_region(case: _Case) -> Row | None:
    return _region(case) if case.number % 2 else None


FILES: dict[str, dict[str, Callable[[_Case], Row | None]]] = {
    "train": {
        "captions.jsonl": _caption,
        "train/MeCoVQA-Complex.json": _complex,
        "train/MeCoVQA-Region.json": _region,
        "train/MeCoVQA-Grounding.json": _grounding,
    },
    "test": {
        "captions_test.jsonl": _caption,
        "test/MeCoVQA_Complex_VQA_test.json": _complex,
        "test/MeCoVQA_Region_VQA_test.json": _open_region,
        "test/MeCoVQA_Region_Closed_VQA_test.json": _closed_region,
        "test/MeCoVQA_Grounding_test.json": _grounding,
    },
}
