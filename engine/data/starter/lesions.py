"""Starter data for skin diagnosis: lesions of seven kinds drawn on real images, in HAM10000's files, prepared as those are.

Each lesion has a crop of a real image (`engine.data.starter.questions.build_grounds`) in skin tones as its ground, and one or two
images, in which it lies at different places. A kind is a colour and a pattern that an eye tells apart: a task to start with, not a
benchmark, and nothing that any lesion looks like.
"""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.lesions import COLUMNS, DIAGNOSES, MASK_SUFFIX
from engine.data.prepare.folder import count_report
from engine.data.prepare.ham10000 import COUNTED, SkinPreparation, build_skin
from engine.data.starter.folder import starter_folder
from engine.data.starter.masked_questions import blob
from engine.data.starter.questions import SIDE, build_grounds
from engine.files import cache_folder, write_json, write_whole

VERSION = 1  # raise it with any change of what is built
LESIONS = 420
SEED = 2026
SKIN = np.array([224.0, 182.0, 156.0])
COLOURS = {  # RGB
    "akiec": (205, 70, 50),
    "bcc": (245, 140, 175),
    "bkl": (190, 150, 40),
    "df": (240, 235, 225),
    "mel": (25, 20, 25),
    "nv": (115, 65, 30),
    "vasc": (95, 20, 120),
}
BODY_PARTS = ("abdomen", "back", "chest", "face", "lower extremity", "neck", "trunk", "upper extremity")
METADATA = "HAM10000_metadata.csv"


def build_starter_skin(folder: str | Path | None = None) -> Path:
    """Make the prepared folder, by default in the cache, and return it; one that is there already is kept."""
    name = f"starter-skin-{VERSION}"

    def build(building: Path) -> None:
        drawn = building.with_name("drawn")  # beside it, and gone with it
        draw_lesions(drawn)
        options = SkinPreparation(metadata=str(drawn / METADATA), output=str(folder or cache_folder() / name))
        write_json(building / "report.json", {"options": asdict(options), **build_skin(options, building)})

    return starter_folder(folder, name, "report.json", build)


def starter_headline() -> dict:
    """The headline numbers of the starter data, as `recipes.skin_prepare` gives them."""
    folder = build_starter_skin()
    return count_report(json.loads((folder / "report.json").read_text(encoding="utf-8")), folder, COUNTED)


def draw_lesions(root: Path) -> None:
    """Write metadata, images and masks of the lesions as HAM10000 has them."""
    crops, rng = build_grounds(), np.random.default_rng(SEED)
    questions = json.loads((crops / "train.json").read_text(encoding="utf-8"))
    grounds = rng.permutation(len(questions))
    for kind in ("HAM10000_images", "HAM10000_segmentations"):
        (root / kind).mkdir(parents=True)
    table, number = io.StringIO(newline=""), 0
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    for lesion in range(LESIONS):
        ground = _ground(crops / questions[grounds[lesion]]["image"])
        dx = list(DIAGNOSES)[lesion % len(DIAGNOSES)]
        about = [dx, "drawn", int(rng.integers(4, 18)) * 5, rng.choice(("female", "male")), rng.choice(BODY_PARTS)]
        radius = draw_radius(rng)
        for _ in range(1 + rng.integers(2)):
            pixels, mask = draw_lesion(ground, dx, radius, rng)
            name = f"DRAWN_{number:05d}"
            Image.fromarray(pixels).save(root / "HAM10000_images" / f"{name}.jpg", quality=95)
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / "HAM10000_segmentations" / f"{name}{MASK_SUFFIX}.png")
            rows.writerow([f"LESION_{lesion:05d}", name, *about])
            number += 1
    write_whole(root / METADATA, table.getvalue())


def spare_grounds() -> list[np.ndarray]:
    """Grey values [H, W] of the crops on which no lesion of the starter data lies: for what a policy learns before."""
    crops = build_grounds()
    questions = json.loads((crops / "train.json").read_text(encoding="utf-8"))
    order = np.random.default_rng(SEED).permutation(len(questions))  # as in `draw_lesions`
    return [_ground(crops / questions[place]["image"]) for place in order[LESIONS:]]


def _ground(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("L"), dtype=np.float32)


def draw_radius(rng: np.random.Generator) -> float:
    """Pixels."""
    return float(rng.uniform(0.09, 0.15) * SIDE)


def draw_lesion(ground: np.ndarray, dx: str, radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[H, W] grey values -> [H, W, 3] uint8 with a lesion, and its mask [H, W] (bool)."""
    from scipy import ndimage  # here: the starter data are made once

    skin = SKIN * (0.8 + 0.2 * np.rot90(ground, int(rng.integers(4)))[..., None] / 255)
    margin = 1.3 * radius / SIDE
    # A third of the lesions at either end of each axis: the middle region holds 36 % of the image, and would hold most.
    place = np.array([rng.choice((margin, rng.uniform(margin, 1 - margin), 1 - margin)) for _ in range(2)]) * SIDE
    mask = blob(ground.shape, place, radius, rng)
    colour = np.array(COLOURS[dx], dtype=np.float32) + rng.normal(0, 8, 3)
    shade = np.ones((*ground.shape, 1))
    if dx in ("akiec", "mel"):  # uneven
        shade = shade + 0.5 * ndimage.gaussian_filter(rng.normal(0, 1, ground.shape), 2)[..., None] * 4
    weight = 0.85 * ndimage.gaussian_filter(mask.astype(np.float32), 1.0)[..., None]
    if dx == "df":  # a pale middle in a brown ring
        core = ndimage.binary_erosion(mask, iterations=max(1, int(radius / 3)))[..., None]
        colour = np.where(core, colour, np.array(COLOURS["nv"]))
    pixels = skin * (1 - weight) + colour * shade * weight + rng.normal(0, 3, skin.shape)
    return pixels.clip(0, 255).astype(np.uint8), mask
