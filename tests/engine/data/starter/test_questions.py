"""The starter questions: held-out regions, balance, and no way to answer without looking."""

import json
import socket
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from engine.data.questions import load_questions
from engine.data.starter.questions import GAP, SIDE, SOURCES, build_grounds, build_starter_data, load_crops, read_source
from engine.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_starter_data(tmp_path_factory.mktemp("starter") / "data")


@pytest.fixture(scope="module", params=["train", "test"])
def rows(folder, request):
    return json.loads((folder / f"{request.param}.json").read_text())


def test_no_source_pixel_is_in_both_splits(folder):
    crops = load_crops(folder).values()
    for source in {crop["source"] for crop in crops}:
        own = [crop for crop in crops if crop["source"] == source]
        train, test = (np.array([crop["box"] for crop in own if crop["split"] == split]) for split in ("train", "test"))
        train, test = train[:, None], test[None]
        # distance of two boxes along x and along y; apart on either axis is apart
        apart = np.maximum(train[..., :2] - test[..., 2:], test[..., :2] - train[..., 2:]).max(-1)
        assert apart.min() >= 2 * GAP, source


def test_crops_are_the_pixels_their_boxes_name(folder):
    chosen = {crop["source"]: (name, crop) for name, crop in load_crops(folder).items() if crop["split"] == "test"}
    for name, crop in chosen.values():
        again = read_source(crop["source"]).crop(crop["box"]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(folder / name)))


def test_no_test_image_is_a_training_image(folder):
    train, test = ({path.read_bytes() for path in (folder / "images").glob(f"{split}_*.png")} for split in ("train", "test"))
    assert train and test and not train & test


def test_something_can_be_seen_on_every_crop(folder):
    greys = [np.asarray(Image.open(path).convert("L")) for path in (folder / "images").iterdir()]
    assert min(grey.std() for grey in greys) > 4.5


def test_the_grounds_of_lesions_are_what_they_were(tmp_path):
    """The figures of all that is drawn on them were measured on these."""
    grounds = build_grounds(tmp_path / "grounds")
    crops = load_crops(grounds)
    assert len(crops) == 1740
    last = [crops[f"images/{name}.png"] for name in ("train_1439", "test_0299")]
    assert [(crop["source"], crop["box"]) for crop in last] == [
        ("MR-SIEMENS-DICOM-WithOverlays.dcm", [363, 256, 450, 343]),
        ("693_UNCR.dcm", [92, 319, 256, 483]),
    ]


def test_six_modalities_and_enough_questions(rows):
    counts = Counter(row["modality"] for row in rows)
    assert set(counts) == set(SOURCES) and len(counts) >= 5
    assert len(rows) >= 240 and len(set(counts.values())) == 1


def test_a_constant_answer_and_the_options_alone_do_not_pass(rows):
    letters = Counter(row["solution"] for row in rows)
    assert max(letters.values()) / len(rows) <= 0.3
    for modality in SOURCES:  # "choose this one wherever it is offered" is right as often as guessing
        offered = [row for row in rows if f"){modality}" in row["problem"]]
        assert sum(row["modality"] == modality for row in offered) / len(offered) <= 0.35


def test_names_and_prompts_tell_nothing(rows):
    for row in rows:
        assert not any(modality.lower()[:4] in row["image"].lower() for modality in SOURCES)
        assert row["problem"].count(row["modality"]) == 1 and "<answer>" not in row["problem"]


def test_the_engine_reads_every_row(folder):
    questions = load_questions(folder / "test.json")
    row = questions[0]
    assert len(questions) == 300 and row["images"][0].size == (112, 112)
    assert all(questions.record(i)["options"][questions.record(i)["answer"]] == questions.record(i)["modality"] for i in range(300))


def test_building_is_deterministic_and_needs_no_network(folder, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    again = build_starter_data(tmp_path / "again")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_a_finished_folder_is_kept_and_an_occupied_one_refused(folder, tmp_path):
    before = (folder / "test.json").stat().st_mtime_ns
    assert build_starter_data(folder) == folder and (folder / "test.json").stat().st_mtime_ns == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        build_starter_data(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
