"""SAM-Med2D (and with it SAM's ViT and decoder) against the original code's outputs."""

import pytest
import torch

from models.sam.frame import Frame
from models.sam.sam import sam_med2d
from tests.models.sam.conftest import Golden

RELATIVE = 1e-4  # the golden files' own: of the largest absolute value


@pytest.fixture(scope="module")
def med2d(golden):
    data = Golden(golden / "uni_medvlm", "sam_med2d_golden")
    with torch.device("meta"):  # 271 million weights need no initial values
        model = sam_med2d()
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    data.fill.fill_(model.state_dict())
    return model, data


@pytest.fixture(scope="module")
def encoded(med2d):
    model, data = med2d
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, y: seen.append(y)) for block in model.image_encoder.blocks]
    embeddings = model.image_encoder(data.seeded(101, (1, 3, 256, 256)))
    for hook in hooks:
        hook.remove()
    return embeddings, seen


def agrees(data, name, tensor):
    scale = abs(data.arrays[name]).max()
    return data.error(name, tensor) <= RELATIVE * scale


def test_the_keys_and_shapes_are_the_published_ones(med2d):
    model, data = med2d
    expected = {key: entry["shape"] for key, entry in data.json("sam_med2d_b256_manifest.json").items()}
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected


def test_every_encoder_block_agrees(med2d, encoded):
    embeddings, blocks = encoded
    assert len(blocks) == 12
    wrong = [i for i, y in enumerate(blocks) if not agrees(med2d[1], f"enc/block{i}_s", y[0, ::4, ::4, ::48])]
    assert not wrong and agrees(med2d[1], "enc/image_embeddings", embeddings)


def test_an_adapter_agrees(med2d):
    model, data = med2d
    y = model.image_encoder.blocks[0].Adapter(data.seeded(102, (1, 16, 16, 768)))
    assert agrees(data, "enc/adapter0_s", y[0, ::2, ::2, ::16])


@pytest.mark.parametrize("case", ["text", "points", "box", "box_points_mask"])
def test_prompts_and_masks_agree(med2d, encoded, case):
    model, data = med2d
    inputs = data.facts["inputs"]
    given = {
        "text": {"text_embeddings": data.seeded(104, (1, 1, 256))[None]},
        "points": {"points": torch.tensor(inputs["points"])[None], "labels": torch.tensor(inputs["labels"])[None]},
        "box": {"boxes": torch.tensor(inputs["box"])[None]},
        "mask": {"masks": data.seeded(103, (1, 1, 64, 64))[None]},
    }
    given = {name: prompt for part in case.split("_") for name, prompt in given[part].items()}
    sparse, dense = model.prompt_encoder(**given)
    assert agrees(data, f"pe/{case}_sparse", sparse[0]) and agrees(data, f"pe/{case}_dense_s", dense[0, 0, ::8, ::4, ::4])
    for multimask, name in ((False, "single"), (True, "multi")):
        masks, iou = model.decode(encoded[0], multimask_output=multimask, **given)
        assert agrees(data, f"dec/{case}_{name}_iou", iou[0])
        assert agrees(data, f"dec/{case}_{name}_low", masks[0, :, :, ::4, ::4] if multimask else masks[0])


def test_masks_of_a_centred_image_find_their_way_back(med2d):
    data = med2d[1]
    frame = Frame.fit((320, 200), 256, "centre")
    assert (frame.resized, frame.left) == ((256, 160), 48)
    masks = frame.masks(torch.from_numpy(data.arrays["dec/text_single_low"]))
    assert agrees(data, "post/correct_s", masks[0, 0, ::8, ::8])


def test_the_plain_encoder_agrees(med2d):
    """Last: it takes the adapters away."""
    model, data = med2d
    for block in model.image_encoder.blocks:
        block.Adapter = None
    y = model.image_encoder(data.seeded(101, (1, 3, 256, 256)))
    assert agrees(data, "enc/no_adapter_s", y[0, ::8, ::2, ::2])
