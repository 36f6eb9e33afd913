"""Boxes and areas are OpenCV's, and regions of the image have the published names."""

import json

import numpy as np
import pytest

from engine.data.lesion_boxes import find_lesion, name_region

# ((height, width, share of lesion pixels), bounding rectangle, contour area) of the i-th random mask, by opencv-python 5.0.0: the
# largest of findContours(RETR_EXTERNAL) by contourArea. 4,000 such masks agreed when this was written.
BY_OPENCV = [
    ((1, 1, 1.0), (0, 0, 1, 1), 0.0),
    ((1, 9, 0.8), (7, 0, 9, 1), 0.0),
    ((9, 1, 0.8), (0, 3, 1, 9), 0.0),
    ((5, 7, 0.5), (0, 0, 7, 5), 4.5),
    ((12, 9, 0.4), (0, 2, 5, 12), 13.0),
    ((20, 31, 0.45), (0, 0, 31, 20), 172.0),
    ((20, 31, 0.55), (0, 0, 31, 20), 304.5),
    ((20, 31, 0.7), (0, 0, 31, 20), 518.5),
    ((33, 17, 0.9), (0, 0, 17, 33), 497.0),
    ((40, 60, 0.42), (5, 0, 60, 40), 536.5),
    ((40, 60, 0.38), (25, 0, 46, 24), 143.0),
    ((6, 6, 0.15), (0, 0, 3, 3), 0.5),
]


def test_boxes_areas_and_names_are_the_published_ones_on_every_golden_rectangle(golden):
    cases = json.loads((golden / "grpo" / "reward_golden.json").read_text())["skin_region_naming_19accca"]
    assert len(cases) == 18
    for case in cases:
        (x, y, w, h), (width, height) = case["rect_xywh"], case["size_wh"]
        mask = np.zeros((height, width), np.uint8)
        mask[y : y + h, x : x + w] = 255
        lesion = find_lesion(mask)
        assert (list(lesion.bbox), lesion.coverage) == (case["bbox"], case["area_coverage"]), case
        assert f"lesion located in {name_region(lesion.bbox, (width, height))} region" == case["spatial_description"], case


@pytest.mark.parametrize("seed", range(len(BY_OPENCV)))
def test_boxes_and_areas_are_opencvs_on_ragged_masks(seed):
    (height, width, share), box, area = BY_OPENCV[seed]
    lesion = find_lesion(np.random.default_rng(seed).random((height, width)) < share)
    assert lesion.bbox == box and lesion.coverage * height * width == pytest.approx(area)


def test_a_pixel_has_no_area_and_a_full_mask_not_quite_all():
    mask = np.zeros((450, 600))
    mask[7, 9] = 1
    assert find_lesion(mask).bbox == (9, 7, 10, 8) and find_lesion(mask).coverage == 0
    assert find_lesion(np.ones((450, 600))).coverage == pytest.approx(0.9961, abs=5e-5)


def test_holes_are_filled_corners_touch_and_the_largest_region_counts():
    ring = np.zeros((9, 30))
    ring[2:7, 2:7], ring[3:6, 3:6] = 1, 0
    assert find_lesion(ring).coverage * ring.size == 16
    diamond = np.zeros((5, 5))
    diamond[1, 2] = diamond[2, 1] = diamond[2, 3] = diamond[3, 2] = 1
    assert find_lesion(diamond).bbox == (1, 1, 4, 4) and find_lesion(diamond).coverage * 25 == 2
    ring[:, 20:24] = 1
    assert find_lesion(ring).bbox == (20, 0, 24, 9)


def test_an_empty_mask_has_no_lesion_and_a_stack_is_no_mask():
    assert find_lesion(np.zeros((3, 4))) is None
    with pytest.raises(ValueError, match=r"mask is \[H, W\], not of shape \(1, 3, 4\)"):
        find_lesion(np.zeros((1, 3, 4)))


def test_a_side_of_odd_length_has_its_half_rounded_down():
    """As published: middles and halves are whole numbers, and the limits themselves are in the center."""
    assert name_region((0, 0, 3, 3), (5, 5)) == "center-center"  # the middle is 1, the limit 0.8
    assert name_region((0, 0, 1, 1), (5, 5)) == "upper-left"
    assert name_region((4, 4, 5, 5), (5, 5)) == "lower-right"
