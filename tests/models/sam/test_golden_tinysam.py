"""TinySAM against the original code's outputs: encoder stages, prompt cases, decoder, end to end."""

import numpy as np
import pytest
import torch

from models.sam.frame import Frame
from models.sam.sam import tiny_sam
from tests.models.sam.conftest import Golden

TOLERANCE = 1e-4  # the golden files' own, absolute, on values of order 1


@pytest.fixture(scope="module")
def tinysam(golden):
    data = Golden(golden / "prs_med", "tinysam_golden")
    model = tiny_sam().eval()
    data.fill.fill_(model.state_dict())
    return model, data


@pytest.fixture(scope="module")
def stages(tinysam):
    """The encoder's stages on the golden image; what is computed in bands is put together again."""
    model, data = tinysam
    seen = {}
    encoder = model.image_encoder
    watched = {"patch_embed": encoder.patch_embed, "l1b0_attn": encoder.layers[1].blocks[0].attn}
    watched |= {f"layer{i}": layer for i, layer in enumerate(encoder.layers)}
    hooks = [
        module.register_forward_hook(lambda _, __, y, name=name: seen.setdefault(name, []).append(y))
        for name, module in watched.items()
    ]
    with torch.inference_mode():
        embeddings = encoder(data.seeded("tinysam.image", (1, 3, 1024, 1024)))
    for hook in hooks:
        hook.remove()
    seen = {name: torch.cat(parts) for name, parts in seen.items()}
    return embeddings, {name: y.flatten(1, 2) if name.startswith("layer") else y for name, y in seen.items()}


def prompts(data, case):
    given = {name: torch.tensor(data.facts["inputs"][name])[None] for name in ("points", "labels", "boxes")}
    given["masks"] = data.seeded("tinysam.mask_in", (2, 1, 256, 256))[None]
    kept = {"points": ["points", "labels"], "box": ["boxes"], "mask": ["masks"]}
    return {name: given[name] for part in case.split("_") for name in kept[part]}


def test_the_keys_and_shapes_are_the_published_ones(tinysam):
    model, data = tinysam
    expected = {entry["key"]: entry["shape"] for entry in data.json("tinysam_manifest.json")["entries"]}
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected


def test_every_encoder_stage_agrees(tinysam, stages):
    embeddings, seen = stages
    errors = {name: tinysam[1].error(name, y) for name, y in (seen | {"image_embeddings": embeddings}).items()}
    assert len(errors) == 7 and max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("case", ["points", "box", "points_box", "points_box_mask"])
def test_prompts_and_masks_agree(tinysam, stages, case):
    model, data = tinysam
    given = prompts(data, case)
    with torch.inference_mode():
        sparse, dense = model.prompt_encoder(**given)
        masks, iou = model.decode(stages[0], multimask_output=True, **given)
        single, _ = model.decode(stages[0], multimask_output=False, **given)
    found = {"sparse": sparse[0], "dense": dense[0].expand(2, -1, -1, -1), "low_res_logits": masks[0], "iou": iou[0]}
    errors = {name: data.error(f"{case}/{name}", y) for name, y in (found | {"mask0_logits": single[0]}).items()}
    assert max(errors.values()) < TOLERANCE, errors


def test_the_decoder_alone_agrees(tinysam):
    model, data = tinysam
    embeddings = data.seeded("tinysam.emb", (1, 256, 64, 64))
    sparse, dense = data.seeded("tinysam.sparse", (3, 5, 256)), data.seeded("tinysam.dense", (3, 256, 64, 64))
    with torch.inference_mode():
        masks, iou = model.mask_decoder(embeddings, model.prompt_encoder.dense_pe(), sparse[None], dense[None], True)
    assert data.error("decoder_only/low_res_logits", masks[0]) < TOLERANCE
    assert data.error("decoder_only/iou", iou[0]) < TOLERANCE
    assert data.error("dense_pe", model.prompt_encoder.dense_pe()[None]) < TOLERANCE


def test_an_image_becomes_the_same_masks_end_to_end(tinysam):
    model, data = tinysam
    image = (data.seeded("tinysam.e2e", (3, 768, 1024)) * 40 + 128).round().clamp(0, 255)
    frame = Frame.fit((480, 640), model.image_size, model.fit)
    given = {name: prompts(data, "points_box")[name][:, :1] for name in ("points", "labels", "boxes")}
    with torch.inference_mode():
        masks, iou = model(frame.pad(model.normalise(image))[None], multimask_output=True, **given)
    assert frame.resized == (768, 1024)
    assert data.error("e2e/low_res_logits", masks[0]) < 1e-3
    assert data.error("e2e/iou", iou[0]) < TOLERANCE
    expected = np.unpackbits(data.arrays["e2e/masks_packed"]).reshape(3, 480, 640).astype(bool)
    assert ((frame.masks(masks[0])[0] > 0).numpy() != expected).mean() < 1e-4
