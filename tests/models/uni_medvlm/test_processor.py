"""What Uni-MedVLM's processor makes of messages, images and regions; regions and masks against MedPLIB's golden data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models.sam.frame import Frame
from models.starter.uni_medvlm import build_tiny_unimed
from models.uni_medvlm.regions import patch_weights, sampled_feature
from models.uni_medvlm.tokens import IMAGE, REGION, REGION_END, REGION_FEATURE
from tests.models.sam.conftest import Golden
from tests.models.uni_medvlm.test_policy import CORPUS, picture, region

PATCHES = 49


@pytest.fixture(scope="module")
def processor():
    return build_tiny_unimed(CORPUS).processor


@pytest.fixture(scope="module")
def medplib(golden):
    return Golden(golden / "uni_medvlm", "medplib_losses_golden")


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_an_image_and_a_region_become_their_tokens(processor):
    prompt = user({"type": "image"}, {"type": "text", "text": "What is in "}, {"type": "region", "mask": region()})
    encoded = processor.encode(prompt, [picture(0)], "key")
    ids = encoded.input_ids.tolist()
    assert ids.count(processor.ids[IMAGE]) == PATCHES and len(encoded.image.regions) == 1 and encoded.image.key == "key"
    start = ids.index(processor.ids[REGION])
    assert ids[start : start + 3] == [processor.ids[token] for token in (REGION, REGION_FEATURE, REGION_END)]
    assert processor.prompt_length(prompt, [(90, 112)]) == processor.prompt_length(prompt, [None]) == len(ids)


def test_a_caption_stands_alone_without_a_template(processor):
    ids = processor.encode([{"role": "caption", "content": [{"type": "image"}]}], [picture(0)]).input_ids.tolist()
    assert ids[:PATCHES] == [processor.ids[IMAGE]] * PATCHES and processor.decode([ids]) == ["\n"]


def test_answers_keep_their_seg_and_end_with_the_end_token(processor):
    (ids,) = processor.answer_ids(["a <SEG> here"])
    assert ids[-1] == processor.tokenizer.eos_token_id and processor.decode([ids]) == ["a <SEG> here"]


@pytest.mark.parametrize("token", ["<SEG>", "<image>", "<region>", "</s>"])
def test_a_users_text_with_one_of_the_models_tokens_is_found(processor, token):
    assert processor.own_token_in(user({"type": "text", "text": f"what is {token}?"})) == token
    assert processor.own_token_in(user({"type": "text", "text": "what is it?"}, {"type": "region", "mask": None})) is None


@pytest.mark.parametrize("parts, images", [([{"type": "image"}], []), ([{"type": "text", "text": "?"}], [picture(0)])])
def test_image_places_and_images_that_differ_are_refused(processor, parts, images):
    with pytest.raises(ValueError, match="expected one of each"):
        processor.encode(user(*parts), images)


def test_a_region_that_covers_nothing_is_refused():
    with pytest.raises(ValueError, match="covers nothing"):
        patch_weights(Image.new("L", (30, 20)), (0, 0, 56, 56), 56, 7)


def test_patches_count_by_the_share_that_a_region_covers():
    mask = np.zeros((56, 56), np.uint8)
    mask[8:16, 4:16] = 1  # half of the patch at column 0 and all of that at column 1, in row 1
    weights = patch_weights(Image.fromarray(mask), (0, 0, 56, 56), 56, 7).view(7, 7)
    assert torch.allclose(weights[1, :2], torch.tensor([1 / 3, 2 / 3])) and weights.sum().item() == pytest.approx(1)
    assert weights.count_nonzero() == 2


def test_golden_region_features_as_medplib_samples_them(medplib):
    features = medplib.seeded(303, (2, 576, 64))
    masks = torch.zeros(2, 24, 24, dtype=torch.bool)
    masks[0, 3:9, 10:20] = True
    masks[1, 20:24, 0:2] = masks[1, 0, 23] = True
    found = torch.stack([sampled_feature(*pair) for pair in zip(features, masks, strict=True)])
    assert medplib.error("region/feat", found) <= 1e-5


def test_golden_masks_lose_their_padding_and_nothing_else(golden):
    """Where the published crop of 64 x 64 logits keeps the wrong rows and columns, the right ones are kept here."""
    table = json.loads((golden / "uni_medvlm" / "medplib_losses_golden.json").read_text())["postprocess_crop_on_64x64"]
    for name, row in table.items():
        height, width = json.loads(name.replace("(", "[").replace(")", "]"))
        frame = Frame.fit((height, width), 256, "centre")
        assert frame.resized == (height, width)
        rows, columns = row["correct_rows"], row["correct_cols"]
        assert [frame.top / 4, (frame.top + height) / 4] == pytest.approx(rows, abs=0.25)
        assert [frame.left / 4, (frame.left + width) / 4] == pytest.approx(columns, abs=0.25)
        inside = torch.full((1, 1, 256, 256), -1.0)
        inside[..., frame.top : frame.top + height, frame.left : frame.left + width] = 1.0
        assert frame.masks(inside).shape == (1, 1, height, width) and (frame.masks(inside) == 1).all()
