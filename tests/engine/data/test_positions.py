"""Positions from masks by both published rules, as words, and read back from texts."""

import csv
import json
import random

import numpy as np
import pytest
from PIL import Image

from engine.data.positions import (
    TEST_TEMPLATES,
    TRAIN_TEMPLATES,
    Position,
    ask,
    describe,
    label,
    locate,
    read_positions,
    same_places,
)


def rectangle(shape, y0, y1, x0, x1) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[y0:y1, x0:x1] = 255
    return mask


def places(text: str) -> list[str]:
    return [position.place for position in read_positions(text)]


def test_masks_are_located_as_the_original_code_does(golden):
    cases = json.loads((golden / "prs_med" / "metrics_position_golden.json").read_text())["positions"]
    for case in cases:
        found = locate(rectangle(case["shape"], *case["rect_y0y1x0x1_halfopen"]))
        expected = () if case["position"] == "no mask" else (Position(case["position"], case["near"]),)
        assert found == expected, case
    assert len(cases) == 10


def test_real_masks_are_located_as_their_labels_say(mini_data):
    rows = [row for path in sorted((mini_data / "prs_med/annotations").glob("*.csv")) for row in csv.DictReader(open(path))]
    for row in rows:
        mask = np.asarray(Image.open(mini_data / "prs_med" / row["image_path"]).convert("L"))
        found = locate(mask)
        assert label(found) == row["position"]
        assert read_positions(row["position"]) == found and same_places(found, read_positions(row["answer"]))
    assert len(rows) == 73


def test_the_second_rule_takes_the_two_largest_regions_and_their_centroids():
    mask = rectangle((100, 100), 0, 30, 0, 30)
    mask[90:95, 2:4] = 1  # the smallest of three
    mask[55:65, 55:65] = 1
    found = locate(mask, "our-dataset")
    assert found == (Position("top left", False), Position("bottom right", True))
    text = "top left region, and another tumour is located in the bottom right quadrant, near the center"
    assert describe(found, "our-dataset") == label(found, "our-dataset") == text
    assert describe(locate(rectangle((100, 100), 50, 60, 40, 49), "our-dataset"), "our-dataset") == (
        "bottom left region and near the center"
    )


@pytest.mark.parametrize("distance, near", [(19, True), (21, False)])
def test_near_is_twenty_pixels_of_the_centroid_by_the_second_rule(distance, near):
    mask = rectangle((400, 400), 200, 201, 200 + distance, 201 + distance)
    assert locate(mask, "our-dataset") == (Position("bottom right", near),)


def test_a_ring_around_the_centre_is_at_the_centre_by_the_first_rule_only():
    ring = rectangle((60, 60), 10, 50, 10, 45) - rectangle((60, 60), 15, 45, 15, 40)
    assert locate(ring)[0].place == "center" and locate(ring, "our-dataset")[0].place == "top left"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It is in the upper-left quadrant.", ["top left"]),
        ("The mass sits at the LOWER RIGHT corner of the scan", ["bottom right"]),
        ("towards the left lower side", ["bottom left"]),
        ("on the right-hand upper side", ["top right"]),
        ("in the upper part of the image, on the left", ["top left"]),
        ("the inferior aspect to the right", ["bottom right"]),
        ("The polyp lies close to the central area.", ["center"]),
        ("right in the middle of the image", ["center"]),
        ("in the centre", ["center"]),
        ("on the left side", ["left"]),
        ("top left, far from the center", ["top left"]),
        ("near the center in the bottom right part", ["bottom right"]),
        ("It is not in the top left but in the bottom right.", ["bottom right"]),
        ("bottom left rather than top right", ["bottom left"]),
        ("away from the center of the image", []),
        ("from left to right", []),
        ("A benign tumor.", []),
        ("", []),
        ("top left region, and another tumour is located in the bottom right quadrant", ["top left", "bottom right"]),
        ("top right, yes, the top right", ["top right"]),
    ],
)
def test_places_are_read_from_texts(text, expected):
    assert places(text) == expected


@pytest.mark.parametrize(
    "text, near",
    [
        ("top left and close to the center", True),
        ("top left, approximately at the center", True),
        ("top left and is not near the center", False),
        ("far away from the central region, in the top left", False),
        ("top left and not centered", False),
        ("in the top left", None),
    ],
)
def test_distance_is_read_from_texts(text, near):
    assert read_positions(text) == (Position("top left", near),)


def test_each_of_two_positions_has_its_own_distance():
    found = read_positions("top left region, and another tumour is located in the bottom right quadrant, near the center")
    assert found == (Position("top left", None), Position("bottom right", True))


@pytest.mark.parametrize("rule", ["prs-med", "our-dataset"])
def test_every_template_is_read_back(rule):
    masks = [rectangle((90, 70), y, y + 8, x, x + 8) for y in (2, 30, 70) for x in (1, 30, 55)]
    masks.append(masks[0] + masks[-1])
    for mask in masks:
        found = locate(mask, rule)
        for test, templates in ((False, TRAIN_TEMPLATES), (True, TEST_TEMPLATES)):
            for seed in range(len(templates)):
                question, answer = ask(found, random.Random(seed), finding="tumor", modality="brain MRI", rule=rule, test=test)
                assert same_places(found, read_positions(answer)), answer
                assert "{" not in question + answer and not read_positions(question)
        assert same_places(found, read_positions(label(found, rule)))


def test_test_questions_are_never_training_questions():
    assert not {question for question, _ in TRAIN_TEMPLATES} & {question for question, _ in TEST_TEMPLATES}


def test_reading_hostile_text_takes_no_time():
    assert read_positions("far from the " * 20000 + "top " * 20000) == (Position("top", None),)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="rule is one of prs-med, our-dataset"):
        locate(np.ones((2, 2)), "other")
    with pytest.raises(ValueError, match=r"mask is \[H, W\]"):
        locate(np.ones((2, 2, 3)))
    assert locate(np.zeros((4, 4)), "our-dataset") == ()
