"""Ten thousand rows of each format that a reader takes load in seconds, in memory that a copy of all images would not fit in."""

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow.parquet import write_table

ROOT = Path(__file__).resolve().parents[3]
ROWS, IMAGES, SIDE = 10_000, 20, 96
COPIES = ROWS * SIDE * SIDE * 3  # bytes of all rows' images, decoded; as PNG files a little more, since they are noise
MEMORY = COPIES // 2
SECONDS = 60  # a hundredth of a second a row would be more


def shared(number: int) -> str:
    return f"scans/{number % IMAGES}.png"


def questions(count: int) -> list[dict]:
    """Rows by the names of our documents."""
    options = [["CT", "MRI", "X-ray"], ["Liver", "Kidney"], ["Axial", "Coronal", "Sagittal", "Other"]]
    rows: list[dict] = []
    for number in range(count):
        found = options[number % 3]
        question = {"image": shared(number), "question": f"What is seen in picture {number}?", "options": found, "answer": found[1]}
        rows.append(question | {"modality": ("CT", "MRI")[number % 2], "question_type": "Anatomy Identification"})
    return rows


def table(path: Path, rows: list[dict]) -> Path:
    """A CSV or TSV file, compressed where its name ends so. Lists are in JSON."""
    rows = [{key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()} for row in rows]
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    """In one group of rows, as pandas writes it."""
    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def as_json(folder: Path, rows: list[dict], name: str = "own.json") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)) if name.endswith(".jsonl") else json.dumps(rows), encoding="utf-8")
    return path


def medr1(folder: Path, count: int) -> Path:
    problem = "Which technique is used for picture {}? A)CT, B)MRI, C)X-ray, D)Ultrasound"
    rows = [
        {"image": shared(i), "problem": problem.format(i), "solution": f"<answer> {'ABCD'[i % 4]} </answer>"} for i in range(count)
    ]
    return as_json(folder, rows, "CT(Computed Tomography)_test.json")


def medvlm(folder: Path, count: int) -> Path:
    rows = [
        {
            "image": [row["image"]],
            "problem": "\n".join(
                [row["question"], *(f"{letter}) {text}" for letter, text in zip("ABCD", row["options"], strict=False))]
            ),
            "solution": "B",
            **{key: row[key] for key in ("question", "options", "answer")},
            "dataset": "OmniMedVQA",
            "subset": "MR (Mag-netic Resonance Imaging)",
        }
        for row in questions(count)
    ]
    return as_json(folder, rows, "MRI_CT_XRAY_300each_dataset.json")


def omnimedvqa(folder: Path, count: int) -> Path:
    options = {"option_A": "CT", "option_B": "MRI", "option_C": "X-ray", "option_D": "Ultrasound"}
    rows = [
        {"question_id": f"A_{i}", "question": f"Which technique, {i}?", "gt_answer": "MRI", "image_path": shared(i)}
        for i in range(count)
    ]
    return as_json(folder, [row | options | {"modality_type": "CT(Computed Tomography)"} for row in rows])


def slake(folder: Path, count: int) -> Path:
    rows = [{"img_id": i, "img_name": shared(i), "question": f"Is it healthy, {i}?", "answer": "Yes"} for i in range(count)]
    return as_json(folder, [row | {"q_lang": "en", "modality": "CT", "content_type": "Organ"} for row in rows], "train.json")


def vqa_rad(folder: Path, count: int) -> Path:
    rows = [
        {"image_name": shared(i), "question": f"Is it normal, {i}?", "answer": "No", "question_type": "PRES"} for i in range(count)
    ]
    return as_json(folder, rows)


def pmc_vqa(folder: Path, count: int) -> Path:
    choices = {f"Choice {letter}": f"{letter}:text {letter}" for letter in "ABCD"}
    rows = [{"Figure_path": shared(i), "Question": f"What is shown, {i}?", **choices, "Answer": "B"} for i in range(count)]
    return table(folder / "train.csv", rows)


def with_names(folder: Path, count: int) -> Path:
    return parquet(folder / "own.parquet", questions(count))


def stored(folder: Path, number: int) -> dict:
    return {"bytes": (folder / shared(number)).read_bytes(), "path": f"{number}.png"}


def with_images(folder: Path, count: int) -> Path:
    images = [stored(folder, number) for number in range(IMAGES)]
    rows = [row | {"image": images[number % IMAGES]} for number, row in enumerate(questions(count))]
    return parquet(folder / "own.parquet", rows)


def shards(folder: Path, count: int) -> Path:
    """PathVQA, as the hub has it."""
    images = [stored(folder, number) for number in range(IMAGES)]
    rows = [{"image": images[i % IMAGES], "question": f"is it normal, {i}?", "answer": "yes"} for i in range(count)]
    (folder / "data").mkdir()
    for shard in range(2):
        parquet(folder / "data" / f"train-0000{shard}-of-00002.parquet", rows[shard::2])
    return folder


def saved(folder: Path, count: int) -> Path:
    """What Med-R1's training reads."""
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    def rows():
        images = [stored(folder, number) for number in range(IMAGES)]
        for i in range(count):
            yield {"image": images[i % IMAGES], "problem": f"Which, {i}? A)CT, B)MRI", "solution": "<answer> A </answer>"}

    features = Features({"image": ImageFeature(), "problem": Value("string"), "solution": Value("string")})
    dataset = Dataset.from_generator(rows, features=features, cache_dir=str(folder / "generated"))
    DatasetDict({"train": dataset}).save_to_disk(str(folder / "CT_384"))
    return folder / "CT_384"


def prs_med(folder: Path, count: int) -> Path:
    """Several questions about each image, as in the published set."""
    root = folder / "prs"
    for kind in ("images", "masks"):
        (root / "breast" / f"train_{kind}").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number in range(IMAGES):
        os.link(folder / shared(number), root / "breast" / "train_images" / f"{number}.png")
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[10:30, number : number + 20] = 255
        Image.fromarray(mask).save(root / "breast" / "train_masks" / f"{number}.png")
    rows = [
        {
            "image_path": f"breast/train_masks/{i % IMAGES}.png",
            "image_name": f"{i % IMAGES}.png",
            "question": f"Where is tumour {i}?",
            "answer": "The tumour is in the top left.",
            "position": "The tumor is in position top left and near the center.",
            "split": "train",
        }
        for i in range(count)
    ]
    table(root / "annotations" / "breast.csv", rows)
    return root


def lesions(folder: Path, count: int) -> list[dict]:
    """HAM10000's records; every lesion has a file of its own name, all of them links to a few."""
    (folder / "images").mkdir()
    rows: list[dict] = []
    for number in range(count):
        name = f"ISIC_{number:07d}"
        os.link(folder / shared(number), folder / "images" / f"{name}.png")
        box = {"bbox": [8.0, 8.0, 30.0, 30.0], "area_coverage": 0.1, "spatial_description": "lesion located in upper-left region"}
        row = {"lesion_id": f"HAM_{number}", "image_id": name, "dx": ("mel", "nv")[number % 2], "dx_type": "histo", "age": 50.0}
        rows.append(row | {"sex": "female", "localization": "back", **box, "mask_available": False})
    return rows


def skin_json(folder: Path, count: int) -> Path:
    return as_json(folder, lesions(folder, count), "ham10000_with_spatial_data.json")


def skin_csv(folder: Path, count: int) -> Path:
    return table(folder / "ham10000_with_spatial_data.csv", lesions(folder, count))


def skin_hub(folder: Path, count: int) -> Path:
    images = [stored(folder, number) for number in range(IMAGES)]
    rest = {"diagnosis": "melanoma", "localization": "back", "bbox": [8.0, 8.0, 30.0, 30.0]}
    return parquet(folder / "train.parquet", [{"image": images[i % IMAGES], **rest} for i in range(count)])


FORMATS: dict[str, tuple[str, Callable[[Path, int], Path]]] = {
    "csv": ("questions", lambda folder, count: table(folder / "own.csv", questions(count))),
    "tsv": ("questions", lambda folder, count: table(folder / "own.tsv", questions(count))),
    "csv.gz": ("questions", lambda folder, count: table(folder / "own.csv.gz", questions(count))),
    "json": ("questions", lambda folder, count: as_json(folder, questions(count))),
    "jsonl": ("questions", lambda folder, count: as_json(folder, questions(count), "own.jsonl")),
    "med-r1": ("questions", medr1),
    "medvlm-r1": ("questions", medvlm),
    "omnimedvqa": ("questions", omnimedvqa),
    "slake": ("questions", slake),
    "vqa-rad": ("questions", vqa_rad),
    "pmc-vqa": ("questions", pmc_vqa),
    "parquet of names": ("questions", with_names),
    "parquet of images": ("questions", with_images),
    "pathvqa": ("questions", shards),
    "save_to_disk": ("questions", saved),
    "prs-med": ("masks", prs_med),
    "skin json": ("lesions", skin_json),
    "skin csv": ("lesions", skin_csv),
    "skin of the hub": ("lesions", skin_hub),
}


def make(folder: Path, count: int, write: Callable[[Path, int], Path]) -> str:
    (folder / "scans").mkdir(parents=True)
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / shared(number))
    return str(write(folder, count))


@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_rows_load_in_seconds_and_bounded_memory(tmp_path, name):
    kind, write = FORMATS[name]
    command = [sys.executable, "-m", "tests.engine.data.measured_load", kind]
    command += [make(tmp_path / "small", 2 * IMAGES, write), make(tmp_path / "large", ROWS, write)]
    env = os.environ | {"VESALIUS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=10 * SECONDS)
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout.splitlines()[-1])
    assert measured["rows"] == ROWS and measured["size"] == [SIDE, SIDE]
    assert measured["seconds"] < SECONDS
    assert measured["growth"] < MEMORY, measured
