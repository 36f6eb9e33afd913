"""CVFM and the whole hybrid encoder against the published code's outputs on seeded weights."""

import pytest
import torch
from transformers import CLIPVisionModel, ConvNextModel

from models.uni_medvlm.encoder.cvfm import CVFM
from models.uni_medvlm.encoder.hybrid_encoder import HybridEncoder, convnext_large, vit_large
from models.uni_medvlm.encoder.loading import PARTS, load_published, present_key
from tests.models.sam.conftest import Golden

RELATIVE = 1e-4  # the golden files' own: of the largest absolute value
CHANNELS, SIDES = (192, 384, 768, 1536), (192, 96, 48, 24)


@pytest.fixture(scope="module")
def fila(golden):
    return Golden(golden / "uni_medvlm", "fila_golden")


def large(**settings):
    with torch.device("meta"):  # 545 million weights need no initial values
        return HybridEncoder(CLIPVisionModel(vit_large()), ConvNextModel(convnext_large()), **settings)


def agrees(data, name, tensor):
    return data.error(name, tensor) <= RELATIVE * abs(data.arrays[name]).max()


@pytest.mark.parametrize("compat, name", [("reference", "final"), ("default", "trainvariant")])
@pytest.mark.parametrize("stage", range(4))
@torch.no_grad()
def test_golden_cvfm_of_both_variants(fila, stage, compat, name):
    module = CVFM(1024, CHANNELS[stage], compat)
    fila.fill.fill_(module.state_dict(), f"cvfm_modules.{stage}.")
    tokens = fila.seeded(200 + stage, (2, 577, 1024))
    y = module(tokens, fila.seeded(210 + stage, (2, CHANNELS[stage], SIDES[stage], SIDES[stage])))
    assert agrees(fila, f"cvfm/{name}_{stage}_s", y[:, ::32, ::32]) and agrees(fila, f"cvfm/{name}_{stage}_cls", y[:, 0, ::8])
    assert compat == "reference" or torch.equal(y[:, 0], tokens[:, 0])


def test_golden_keys_and_shapes_are_the_encoders(fila):
    """Every published key has its place, and every place has its key."""
    shapes = {key: entry["shape"] for key, entry in fila.json("hybrid_encoder_manifest.json").items()}
    present = {present_key(key): shape[:1] if key.endswith(".layer_scale") else shape for key, shape in shapes.items()}
    assert len(present) == len(shapes)
    encoder = large(compat="reference")
    assert {key: list(tensor.shape) for key, tensor in encoder.state_dict().items()} == present
    assert sum(p.numel() for p in encoder.cvfm_modules.parameters()) == fila.facts["param_counts"]["cvfm"]


@pytest.mark.slow
@torch.no_grad()
def test_golden_hybrid_encoder_at_full_size(fila):
    """CLIP ViT-L/14-336 and ConvNeXt-L at 768, fused after layers 2, 6, 12 and 20, with the published CVFM."""
    encoder = large(compat="reference").to_empty(device="cpu").eval()
    encoder.vision_tower.embeddings.position_ids = torch.arange(577)[None]  # a buffer that no file holds
    shapes = {key: entry["shape"] for key, entry in fila.json("hybrid_encoder_manifest.json").items()}
    for part in PARTS:  # one at a time, for the memory's sake
        state = fila.fill.fill_({key: torch.empty(shape) for key, shape in shapes.items() if key.startswith(part)})
        load_published(encoder, state, "the golden weights")
    del state

    images, stages, layers = fila.seeded(221, (1, 3, 768, 768)), [], []
    for stage in encoder.convnext_encoder.encoder.stages:
        stage.register_forward_hook(lambda _, __, y: stages.append(y))
    for module in [*encoder.cvfm_modules, encoder.vision_tower.encoder.layers[22]]:
        module.register_forward_hook(lambda _, __, y: layers.append(y))
    y = encoder(fila.seeded(220, (1, 3, 336, 336)), images)
    for i, x in enumerate(stages):
        _, channels, height, width = x.shape
        assert agrees(fila, f"hyb/convnext_stage{i}_s", x[0, :: channels // 16, :: height // 8, :: width // 8])
    for number, x in zip((1, 5, 11, 19, 22), layers, strict=True):
        assert agrees(fila, f"hyb/layer{number}_s", x[0, ::32, ::32])
    assert agrees(fila, "hyb/out_s", y[0, ::8, ::16])
