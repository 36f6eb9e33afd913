"""How far an attack went, in numbers and as a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.runs.attacked_answers import norms, strip


def test_norms_are_over_all_images_of_a_row():
    changes = [torch.full((4, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), -1.0)]
    assert norms(changes) == {"linf": 1.0, "l2": pytest.approx((48 * 0.25 + 12) ** 0.5)}


def test_a_strip_shows_the_image_the_changed_one_and_ten_times_the_difference():
    image = Image.new("RGB", (100, 40), (100, 50, 250))
    changed = Image.new("RGB", (100, 40), (103, 48, 230))
    pixels = np.asarray(strip(image, changed))
    assert pixels.shape == (40, 304, 3)
    assert pixels[0, 0].tolist() == [100, 50, 250] and pixels[0, 150].tolist() == [103, 48, 230]
    assert pixels[0, 101].tolist() == [255, 255, 255]
    assert pixels[0, 303].tolist() == [158, 108, 0]  # 128 + 10 * difference, within 0 to 255
