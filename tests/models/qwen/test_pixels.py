"""Pixels are those of the image and back, and a changed image can be kept as a picture that the processor reads as it is."""

import pytest
import torch

from models.qwen.pixels import QwenPixels
from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import encode, noise_image, ragged_prompts, save_tiny


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def policy(request, tmp_path_factory):
    return load_qwen_vl(save_tiny(tmp_path_factory.mktemp("tiny"), request.param))


@pytest.fixture(scope="module")
def asked(policy):
    """Prompts, images and their batch; the last prompt has two images."""
    prompts, images = ragged_prompts(3)
    prompts.append([{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "And?"}]}])
    images.append([noise_image(7), noise_image(8, 56, 112)])
    return prompts, images, encode(policy, prompts, images, list("abcd"))


@pytest.fixture(scope="module")
def pixels(policy):
    return QwenPixels(policy.processor.image_processor)


def test_a_picture_of_the_pixels_is_the_image(asked, pixels):
    _, images, batch = asked
    pictures = pixels.pictures(batch, pixels.of(batch))
    assert [picture.tobytes() for picture in pictures] == [image.tobytes() for group in images for image in group]
    assert [picture.size for picture in pictures] == [image.size for group in images for image in group]


def test_pixels_go_back_and_have_no_keys(asked, pixels):
    batch = asked[2]
    again = pixels.put(batch, pixels.of(batch))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(batch.pixel_values, again.pixel_values, strict=True))
    assert again.image_keys == [None] * 5 and again.image_counts == [1, 1, 1, 2]


def test_a_changed_image_is_what_the_processor_makes_of_its_picture(policy, asked, pixels):
    prompts, _, batch = asked
    attacked = [(x + 5 / 255).clamp(0, 1) for x in pixels.of(batch)]
    *single, first, second = pixels.pictures(batch, attacked)
    encoded = encode(policy, prompts, [[picture] for picture in single] + [[first, second]])
    for x, y in zip(pixels.put(batch, attacked).pixel_values, encoded.pixel_values, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_std_is_that_of_the_channels(policy, pixels):
    assert pixels.std.shape == (3, 1, 1) and pixels.std.flatten().tolist() == pytest.approx(
        policy.processor.image_processor.image_std
    )
