"""Starter data for segmentation: "where is the lesion in this CT?", with masks, in PRS-Med's folder and CSV format.

Drawn lesions on real images: each is a crop of one (`engine.data.starter.questions.build_grounds`: CT, MRI, X-ray,
ultrasound, fundus, microscopy, scintigraphy; training and test crops share no pixel), mirrored at random so that the picture alone
says nothing about the place, with a blob that is brighter or darker than what lies around it. It is a task to start with, not a
benchmark.
"""

import csv
import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.masked_questions import COLUMNS
from engine.data.positions import ask, label, locate
from engine.data.starter.folder import starter_folder
from engine.data.starter.questions import build_grounds
from engine.files import write_whole

VERSION = 3  # raise it with any change of what is built
NAME = "starter_lesions"
COUNTS = {"train": 600, "test": 120}
SHADES = (235.0, 20.0)
SEED = 2025


def build_lesions(folder: str | Path | None = None) -> Path:
    """Make the data root in `folder`, by default in the cache, and return it; one that is there already is kept."""
    return starter_folder(folder, f"starter-lesions-{VERSION}", "annotations", _write)


def _write(root: Path) -> None:
    crops, words, rng = build_grounds(), random.Random(SEED), np.random.default_rng(SEED)
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    for split, count in COUNTS.items():
        questions = json.loads((crops / f"{split}.json").read_text(encoding="utf-8"))
        for kind in ("images", "masks"):
            (root / NAME / f"{split}_{kind}").mkdir(parents=True)
        for i in range(count):
            question = questions[i % len(questions)]
            with Image.open(crops / question["image"]) as opened:
                crop = np.asarray(opened.convert("RGB"), dtype=np.float32)[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
            pixels, mask = draw_lesion(crop, rng)
            name = f"{i:04d}.png"
            Image.fromarray(pixels).save(root / NAME / f"{split}_images" / name)
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / NAME / f"{split}_masks" / name)
            positions = locate(mask)
            text = ask(positions, words, finding="lesion", modality=question["modality"], rule="prs-med", test=split == "test")
            rows.writerow([f"{NAME}/{split}_masks/{name}", name, *text, label(positions), split])
    write_whole(root / "annotations" / f"{NAME}.csv", table.getvalue())


def draw_lesion(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[H, W, 3] in 0-255 -> the same with a blob (uint8), and its mask [H, W] (bool).

    It lies clearly in one place: its middle well within a radius of the image's, or beyond that and off both midlines.
    """
    from scipy import ndimage  # here: the starter data are made once

    height, width = pixels.shape[:2]
    radius = rng.uniform(0.1, 0.18) * height
    margin = int(1.3 * radius)
    places, levels = rng.integers(margin, (height - margin, width - margin), (80, 2)), rng.choice(SHADES, 80)
    away = np.abs(places - (height / 2, width / 2))
    clear = (away.max(1) < 0.7 * radius) | ((away.max(1) > 1.3 * radius) & (away.min(1) > 0.06 * height))
    brightness = ndimage.uniform_filter(pixels.mean(-1), height // 5)
    contrast = clear * np.abs(brightness[places[:, 0], places[:, 1]] - levels)
    best = np.argmax(contrast > 110) if (contrast > 110).any() else np.argmax(contrast)  # the first that shows, or what shows most
    mask, level = blob((height, width), places[best], radius, rng), levels[best]
    weight = 0.75 * ndimage.gaussian_filter(mask.astype(np.float32), 1.0)[..., None]
    pixels = pixels * (1 - weight) + (level + rng.normal(0, 6, pixels.shape)) * weight
    return pixels.clip(0, 255).astype(np.uint8), mask


def blob(shape: tuple[int, int], center: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """A wavy ellipse within 1.28 radii, [H, W] bool."""
    y, x = np.mgrid[: shape[0], : shape[1]] - center[:, None, None]
    angle = np.arctan2(y, x)
    reach = radius * (1 + 0.2 * np.cos(2 * angle + rng.uniform(0, 6.28)) + 0.08 * np.cos(3 * angle + rng.uniform(0, 6.28)))
    return np.hypot(y, x) < reach
