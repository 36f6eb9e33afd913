"""PRS-Med against the original code's outputs: decoder stages, both versions, and from image to losses."""

import pytest
import torch
import torch.nn.functional as F

from engine.training.losses.masks import dice_loss, structure_loss
from models.prs_med.decoder import PromptedMaskDecoder, class_head
from models.sam.sam import tiny_sam
from tests.models.sam.conftest import Golden

TOLERANCE = 1e-4  # the golden files' own, absolute; 1e-3 from image to mask


@pytest.fixture(scope="module")
def decoded(golden):
    data = Golden(golden / "prs_med", "prsmed_decoder_golden")
    return data, data.seeded("prsmed.image_feat", (2, 256, 64, 64)), data.seeded("prsmed.prompt_feat", (2, 640, 4096))


def filled(data, module):
    data.fill.fill_(module.state_dict())
    return module.eval()


def test_the_keys_and_shapes_are_the_published_ones(decoded):
    manifest = decoded[0].json("prsmed_manifest.json")
    modules = {"entries": PromptedMaskDecoder(), "v6_entries": PromptedMaskDecoder(input_norms=False), "cls_entries": class_head()}
    for name, module in modules.items():
        expected = {entry["key"]: entry["shape"] for entry in manifest[name]}
        assert {key: list(tensor.shape) for key, tensor in module.state_dict().items()} == expected


def test_every_stage_of_the_decoder_agrees(decoded):
    data, image, prompt = decoded
    decoder, seen = filled(data, PromptedMaskDecoder()), {}
    for name in ("prompt_projection", "attn", "norm1", "encoder_layer", "ffn", "mask_generation", "out_dec"):
        getattr(decoder, name).register_forward_hook(
            lambda _, __, y, name=name: seen.update({name: y[0] if isinstance(y, tuple) else y})
        )
    with torch.no_grad():
        seen["mask_logits"] = decoder(image, prompt)
        seen["cls"] = filled(data, class_head())(image)
    errors = {name: data.error(name, y) for name, y in seen.items()}
    assert len(errors) == 9 and max(errors.values()) < TOLERANCE, errors


def test_version_6_and_small_inputs_agree(decoded):
    data, image, prompt = decoded
    small = data.seeded("prsmed.small_img", (1, 256, 16, 16)), data.seeded("prsmed.small_prompt", (1, 7, 4096))
    with torch.no_grad():
        assert data.error("v6/mask_logits", filled(data, PromptedMaskDecoder(input_norms=False))(image, prompt)) < TOLERANCE
        assert data.error("small/mask_logits", filled(data, PromptedMaskDecoder())(*small)) < TOLERANCE


@pytest.fixture(scope="module")
def forward(golden):
    """TinySAM's encoder, class head and decoder on the golden images, with the masks of the golden losses."""
    data = Golden(golden / "prs_med", "prsmed_forward_golden")
    sam = tiny_sam().eval()
    data.fill.fill_(sam.state_dict())
    decoder, cls = filled(data, PromptedMaskDecoder()), filled(data, class_head())
    with torch.no_grad():
        embedding = sam.image_encoder(data.seeded("prsmed.sam_img", (2, 3, 1024, 1024)))
        logits = decoder(embedding, data.seeded("prsmed.hidden", (2, 620, 4096)))
        seen = {"image_embedding": embedding, "mask_logits": logits, "cls": cls(embedding)}
    y, x = torch.meshgrid(torch.arange(1024), torch.arange(1024), indexing="ij")
    disc = (y - 400) ** 2 + (x - 500) ** 2 < 180**2
    box = ((y - 700).abs() < 90) & ((x - 300).abs() < 220)
    return data, seen, torch.stack([disc, box])[:, None].float()


def test_an_image_becomes_the_same_mask_and_class_end_to_end(forward):
    data, seen, _ = forward
    errors = {name: data.error(name, tensor) for name, tensor in seen.items()}
    assert errors["image_embedding"] < TOLERANCE and errors["cls"] < TOLERANCE and errors["mask_logits"] < 1e-3, errors


def test_the_losses_are_the_published_ones_as_written_and_as_intended(forward):
    data, seen, masks = forward
    logits = seen["mask_logits"]
    found = {
        "structure_loss_as_written": structure_loss(logits, masks, edge_weights=False),
        "structure_loss_intended_reduction_none": structure_loss(logits, masks),
        "bce_logits_mean": F.binary_cross_entropy_with_logits(logits, masks),
        "dice_loss_smooth1": dice_loss(logits, masks),
        "cls_ce": F.cross_entropy(seen["cls"], torch.tensor([3, 0])),
    }
    errors = {name: abs(value.item() - data.facts["losses"][name]) for name, value in found.items()}
    assert max(errors.values()) < TOLERANCE, errors
