"""Starter data for Uni-MedVLM: every file is read, regions and masks are where the words say, and nothing is told by a constant."""

import json
from collections import Counter

import numpy as np
import pytest

from engine.data.mecovqa.captions import load_captions
from engine.data.mecovqa.rows import load_mecovqa
from engine.data.mecovqa.samed2d import class_of, read_classes, read_index, read_name
from engine.data.positions import locate
from engine.data.starter.unimed import COUNTS, build_starter_unimed

KINDS = {"complex", "region", "grounding"}


@pytest.fixture(scope="module")
def folder():
    return build_starter_unimed()


@pytest.mark.parametrize("split", ["train", "test"])
def test_there_is_a_row_of_each_kind_about_every_image(folder, split):
    rows, captions = load_mecovqa(folder, split=split), load_captions(folder, split=split)
    assert Counter(record["kind"] for record in rows.records) == dict.fromkeys(KINDS, COUNTS[split])
    assert len(captions) == COUNTS[split] and not rows.skipped
    images = {record["image_id"] for record in rows.records}
    assert len(images) == COUNTS[split] and images == {record["image_id"] for record in captions.records}


def test_words_masks_and_regions_say_the_same(folder):
    classes = read_classes(folder / "SAMed2D_v1_class_mapping_id.json")
    rows, captions = load_mecovqa(folder, split="test"), load_captions(folder, split="test")
    lesions = {row["image_id"]: np.asarray(row["masks"][0]) > 0 for row in rows if row["kind"] == "grounding"}
    for row in captions:
        place = locate(lesions[row["image_id"]])[0].place.replace("top", "upper").replace("bottom", "lower")
        assert row["answer"].endswith(f"lesion in the {place}.") and read_name(row["image_id"]).dataset == "starter"
        pixels = np.asarray(row["images"][0].convert("L"), dtype=float)[lesions[row["image_id"]]]
        assert (pixels.mean() > 127) == ("bright" in row["answer"])
    for row in rows:
        if row["kind"] == "region":
            region, shown = np.asarray(row["region"]) > 0, class_of(read_name(row["region_id"]), classes)
            is_lesion = "lesion" in shown
            assert (region & lesions[row["image_id"]]).any() == is_lesion and region.sum() > 100
            assert row["answer"] == (("yes" if is_lesion else "no") if row["answer_type"] == "closed" else row["answer"])
            assert row["answer_type"] == "closed" or shown in row["answer"]


def test_a_constant_answer_is_not_enough(folder):
    for split, most in (("train", 0.62), ("test", 0.75)):
        records = load_mecovqa(folder, split=split).records
        for kind in ("region", "complex"):
            for question, answers in _answers(records, kind).items():
                assert answers.total() < 10 or max(answers.values()) <= most * answers.total(), (question, answers)


def _answers(records, kind):
    found = {}
    for record in records:
        if record["kind"] == kind:
            found.setdefault(record["question"], Counter())[record["answer"]] += 1
    return found


def test_some_names_lack_their_png_and_some_masks_are_of_0_and_1(folder):
    items = json.loads((folder / "train" / "MeCoVQA-Grounding.json").read_text(encoding="utf-8"))
    bare = sum(not item["image"].endswith(".png") for item in items)
    assert bare == len(items) / 10
    from PIL import Image

    levels = Counter()
    for path in sorted((folder / "masks").iterdir())[:40]:
        with Image.open(path) as mask:
            levels[np.asarray(mask).max().item()] += 1
    assert levels[1] and levels[255] and set(levels) == {1, 255}


def test_the_index_names_every_image_and_mask_and_test_pixels_are_not_trained_on(folder):
    index = read_index(folder / "SAMed2D_v1.json")
    assert len(index) == sum(COUNTS.values()) and all(
        (folder / name).is_file() for pair in index.items() for name in [pair[0], *pair[1]]
    )
    assert all(read_name(mask).image == read_name(image).image for image, masks in index.items() for mask in masks)


def test_it_is_the_same_each_time(folder, tmp_path):
    again = build_starter_unimed(tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
