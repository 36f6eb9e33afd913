"""What Uni-MedVLM's processor makes of messages, images and regions; regions and masks against MedPLIB's golden data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models.sam.frame import Frame
from models.starter.uni_medvlm import CHAT_TEMPLATE, build_tiny_unimed
from models.uni_medvlm.processor import SYSTEM
from models.uni_medvlm.regions import patch_weights, sampled_weights
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
    found = torch.stack([sampled_weights(mask) @ own for own, mask in zip(features, masks, strict=True)])
    assert medplib.error("region/feat", found) <= 1e-5


def test_points_are_those_of_torchs_grid_sample():
    """Also of a region that is the whole image: more points than the published code takes."""
    features = torch.randn(576, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for mask in (torch.ones(24, 24, dtype=torch.bool), torch.rand(24, 24, generator=torch.Generator().manual_seed(1)) > 0.7):
        rows, columns = torch.where(mask)
        points = torch.stack([columns, rows], -1).double() / 24
        grid = features.T.reshape(1, 8, 24, 24)
        expected = torch.nn.functional.grid_sample(grid, 2 * points[None, None] - 1, align_corners=True)[0, :, 0].mean(-1)
        torch.testing.assert_close(sampled_weights(mask).double() @ features, expected, atol=1e-6, rtol=1e-6)


def test_the_reference_reads_points_and_the_default_shares():
    published, own = build_tiny_unimed(CORPUS, compat="reference").processor, build_tiny_unimed(CORPUS).processor
    mask = np.zeros((56, 56), np.uint8)
    mask[16:40, 24:48] = 255  # whole patches: rows 2 to 4, columns 3 to 5
    prompt = user({"type": "image"}, {"type": "region", "mask": Image.fromarray(mask)})
    (points,), (shares,) = (p.encode(prompt, [picture(0, 56, 56)]).image.regions for p in (published, own))
    covered = torch.zeros(7, 7, dtype=torch.bool)
    covered[2:5, 3:6] = True
    assert torch.equal(points, sampled_weights(covered)) and torch.equal(shares, covered.flatten() / 9)

    mask[:] = 0
    mask[9:12, 9:12] = 255  # between the first pixels of the patches
    prompt = user({"type": "image"}, {"type": "region", "mask": Image.fromarray(mask)})
    (points,), (shares,) = (p.encode(prompt, [picture(0, 56, 56)]).image.regions for p in (published, own))
    assert not points.any() and shares.view(7, 7)[1, 1] == 1


def test_a_region_of_another_size_than_its_image_is_refused(processor):
    prompt = user({"type": "image"}, {"type": "region", "mask": region(40, 30)})
    with pytest.raises(ValueError, match="a region of 30 x 40 pixels on an image of 112 x 90"):
        processor.encode(prompt, [picture(0)])


def test_a_region_without_an_image_is_refused(processor):
    with pytest.raises(ValueError, match="no image that it lies on"):
        processor.encode(user({"type": "region", "mask": region()}), [])


def test_in_tiles_a_region_lies_where_the_global_view_shows_it():
    """A wide image fills the view's width and the middle of its height."""
    processor = build_tiny_unimed(CORPUS, tiling=True).processor
    prompt = user({"type": "image"}, {"type": "region", "mask": Image.new("L", (112, 56), 255)})
    encoded = processor.encode(prompt, [picture(0, 56, 112)])
    (weights,) = encoded.image.regions
    rows = weights.view(7, 7).sum(1)
    assert encoded.image.views.images_vit.shape[0] == 3 and len(weights) == PATCHES
    assert rows.sum().item() == pytest.approx(1) and not rows[[0, 6]].any() and rows[3] > rows[1] == pytest.approx(rows[5])


# ---- templates ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def written():
    """`written(template, prompt)`: what a processor with this chat template writes of a prompt, and the start token."""

    def write(template, prompt):
        processor = build_tiny_unimed(CORPUS).processor
        processor.tokenizer.chat_template = template
        ids = processor.encode(prompt, [picture(0)] if "image" in str(prompt) else []).input_ids.tolist()
        return processor.tokenizer.decode(
            [id for place, id in enumerate(ids) if id != processor.ids[IMAGE] or ids[place - 1] != id]
        )

    return write


def test_without_a_chat_template_prompts_are_llavas(written):
    prompt = user({"type": "image"}, {"type": "text", "text": "What?"})
    assert written(None, prompt) == f"<s>{SYSTEM}USER: <image>\nWhat? ASSISTANT:"
    turns = [{"role": "system", "content": "Be brief."}, *prompt, {"role": "assistant", "content": "A lesion."}]
    assert written(None, turns) == "<s>Be brief. USER: <image>\nWhat? ASSISTANT: A lesion.</s>"


def test_a_caption_has_the_start_token_where_prompts_have_it(written):
    caption = [{"role": "caption", "content": [{"type": "image"}]}]
    assert written(None, caption) == written("<s>" + CHAT_TEMPLATE, caption) == "<s><image>\n"
    assert written(CHAT_TEMPLATE, caption) == "<image>\n"


# ---- masks ----------------------------------------------------------------------------------------------------------------


def test_golden_masks_lose_their_padding_and_nothing_else(golden):
    """The published crop of 64 x 64 logits keeps the wrong rows and columns; here each pixel has the logits of its own place. An
    odd padding is half a pixel of 256 off: an eighth of a logit."""
    table = json.loads((golden / "uni_medvlm" / "medplib_losses_golden.json").read_text())["postprocess_crop_on_64x64"]
    for name, row in table.items():
        height, width = json.loads(name.replace("(", "[").replace(")", "]"))
        frame = Frame.fit((height, width), 256, "centre")
        assert frame.resized == (height, width)
        place = torch.arange(64) + 0.5  # of each logit, along a side
        ramps = torch.stack([place[:, None].expand(64, 64), place.expand(64, 64)])[None]
        vertical, horizontal = frame.masks(ramps)[0]
        assert vertical.shape == (height, width)
        for found, length, (first, last) in (
            (vertical[:, 0], height, row["correct_rows"]),
            (horizontal[0], width, row["correct_cols"]),
        ):
            pixels = first + (torch.arange(length) + 0.5) * (last - first) / length
            torch.testing.assert_close(found, pixels.clamp(0.5, 63.5), atol=0.126, rtol=0)
        assert (vertical == vertical[:, :1]).all() and (horizontal == horizontal[:1]).all()
