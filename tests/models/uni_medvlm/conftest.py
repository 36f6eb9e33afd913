"""A hybrid encoder small enough for tests, a ViT of 5 layers with 4 x 4 patches and a ConvNeXt at 128 pixels; and what stages 1 to
3 leave of a small model, made once."""

import pytest
import torch
from transformers import CLIPVisionModel, ConvNextModel

from models.uni_medvlm.encoder.hybrid_encoder import HybridEncoder, convnext_large, vit_large
from models.uni_medvlm.stages.artifacts import load_stage1, load_stage2, save_stage1, save_stage2, save_stage3
from models.uni_medvlm.stages.trainable import prepare_stage
from tests.models.uni_medvlm.small_unimed import LORA, disturb, small_unimed


@pytest.fixture
def tiny_encoder():
    def make(seed=0, **settings):
        torch.manual_seed(seed)
        vit = vit_large(
            hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, image_size=56, projection_dim=16
        )
        towers = CLIPVisionModel(vit), ConvNextModel(convnext_large(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1]))
        return HybridEncoder(*towers, **{"fused_after": (1, 2, 3, 4), **settings}).eval()

    return make


@pytest.fixture
def tiny_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 56, 56, generator=generator), torch.randn(2, 3, 128, 128, generator=generator)


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """{name: folder} of stage1, stage2, stage3 (on stage 2's weights) and stage3_alone (on the bare language model)."""
    folder = tmp_path_factory.mktemp("stages")
    policy = small_unimed()
    prepare_stage(policy.model, 1)
    disturb(policy.model)
    save_stage1(policy.model, folder / "stage1")

    policy = small_unimed()
    load_stage1(policy.model, folder / "stage1")
    prepare_stage(policy.model, 2, LORA)
    disturb(policy.model)
    save_stage2(policy.model, folder / "stage2")

    for name in ("stage3", "stage3_alone"):
        policy = small_unimed()
        load_stage1(policy.model, folder / "stage1")
        if name == "stage3":
            load_stage2(policy.model, folder / "stage2")
        prepare_stage(policy.model, 3, LORA)
        disturb(policy.model)
        save_stage3(policy.model, folder / name)
    return {path.name: path for path in folder.iterdir()}
