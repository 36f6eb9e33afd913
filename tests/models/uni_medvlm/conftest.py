"""A hybrid encoder small enough for tests: a ViT of 5 layers with 4 x 4 patches, a ConvNeXt at 128 pixels."""

import pytest
import torch
from transformers import CLIPVisionModel, ConvNextModel

from models.uni_medvlm.encoder.hybrid_encoder import HybridEncoder, convnext_large, vit_large


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
