"""What is drawn over an image lies where it should, in the colour that says what it is."""

import numpy as np
import pytest
from PIL import Image

from engine.errors import InputError
from engine.report.overlay import draw_overlay, write_png

RED, GREEN, YELLOW, GREY = [255, 64, 64], [64, 224, 96], [255, 255, 0], [100, 100, 100]


def grey(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), (100,) * len(mode) if len(mode) > 1 else 100)


def test_an_overlay_tints_the_mask_and_draws_both_edges():
    image = grey()
    mask, truth = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    mask[5:20, 5:20] = truth[8:28, 25:35] = True
    drawn = np.asarray(draw_overlay(image, mask, truth=truth, box=(1, 1, 38, 28)))
    assert (drawn[12, 12] != 100).any() and drawn[12, 12, 0] > drawn[12, 12, 1]  # inside: tinted
    assert drawn[5, 10].tolist() == RED and drawn[8, 30].tolist() == GREEN and drawn[1, 20].tolist() == YELLOW
    assert drawn[24, 30].tolist() == GREY and drawn[3, 3].tolist() == GREY
    assert np.asarray(image).max() == 100  # the image itself stays


def test_a_region_that_was_asked_about_has_a_yellow_edge_below_the_others():
    region, truth = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    region[5:20, 5:20] = truth[5:20, 15:35] = True
    drawn = np.asarray(draw_overlay(grey(), truth=truth, region=region))
    assert drawn[10, 5].tolist() == YELLOW and drawn[10, 15].tolist() == GREEN and drawn[10, 10].tolist() == GREY
    assert drawn[5, 10].tolist() == YELLOW and drawn[5, 17].tolist() == GREEN


def test_a_predicted_box_is_red_and_the_true_one_green():
    drawn = np.asarray(draw_overlay(grey(), predicted_box=(4, 5, 20, 25), true_box=(12, 8, 36, 22)))
    assert drawn[15, 4].tolist() == RED and drawn[15, 36].tolist() == GREEN
    assert drawn[12, 18].tolist() == GREY and drawn[2, 2].tolist() == GREY


def test_equal_boxes_are_both_seen():
    drawn = np.asarray(draw_overlay(grey(400, 300), predicted_box=(50, 60, 200, 220), true_box=(50, 60, 200, 220)))
    found = drawn[150].tolist()
    assert RED in found and GREEN in found


@pytest.mark.parametrize("box", [(20, 25, 4, 5), (-9, -9, 500, 999999), (900.5, 900, 999, 999)])
def test_a_box_that_a_model_wrote_may_be_anywhere(box):
    drawn = np.asarray(draw_overlay(grey(mode="L"), predicted_box=box))
    assert drawn.shape == (30, 40, 3) and (RED in drawn.reshape(-1, 3).tolist()) == (box[0] == 20)


def test_a_picture_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    assert write_png(tmp_path / "a" / "b.png", grey()) == str(tmp_path / "a" / "b.png")
    with pytest.raises(InputError, match="cannot be written"):
        write_png(tmp_path / "a" / "b.png" / "c.png", grey())
