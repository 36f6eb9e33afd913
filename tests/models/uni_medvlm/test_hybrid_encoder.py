"""The hybrid encoder: exactly CLIP before it learns, gradients where they belong, published weights, tiles."""

import pytest
import torch
from transformers import CLIPVisionModel

from models.checkpoint import CheckpointError
from models.uni_medvlm.encoder.cvfm import CVFM
from models.uni_medvlm.encoder.loading import load_published
from models.uni_medvlm.encoder.tiling import windows


def opened(encoder):
    """The encoder with CVFMs that have learnt something."""
    torch.manual_seed(5)
    for parameter in encoder.cvfm_modules.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def test_at_initialisation_it_is_the_clip_tower_bit_for_bit(tiny_encoder, tiny_images):
    encoder = tiny_encoder()
    hidden_states = encoder.vision_tower(tiny_images[0], output_hidden_states=True).hidden_states
    assert torch.equal(encoder(*tiny_images), hidden_states[-2][:, 1:])
    assert not torch.allclose(opened(encoder)(*tiny_images), hidden_states[-2][:, 1:])


def test_the_published_variant_is_not_the_identity_at_initialisation(tiny_encoder, tiny_images):
    encoder = tiny_encoder(compat="reference")
    plain = encoder.vision_tower(tiny_images[0], output_hidden_states=True).hidden_states[-2][:, 1:]
    assert (encoder(*tiny_images) - plain).abs().max() > 0.1


@pytest.mark.parametrize("compat", ["default", "reference"])
def test_gradients_reach_every_cvfm_parameter_and_nothing_else(tiny_encoder, tiny_images, compat):
    encoder = tiny_encoder(compat=compat).train()
    target = torch.randn(encoder(*tiny_images).shape)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    for _ in range(3):  # the first step opens what the next ones go through
        optimizer.zero_grad()
        (encoder(*tiny_images) - target).pow(2).mean().backward()
        optimizer.step()
    silent = [name for name, p in encoder.cvfm_modules.named_parameters() if p.grad is None or not p.grad.any()]
    changed = {name for name, parameter in encoder.named_parameters() if not torch.equal(parameter, before[name])}
    assert not silent and changed == {name for name in before if name.startswith("cvfm_modules.")}


def test_the_first_step_changes_the_output(tiny_encoder, tiny_images):
    encoder = tiny_encoder()
    encoder(*tiny_images).pow(2).mean().backward()
    last = [module.mlp[2].weight.grad for module in encoder.cvfm_modules]
    assert all(gradient.abs().max() > 0 for gradient in last)


def test_checkpointed_layers_have_the_same_gradients(tiny_encoder, tiny_images):
    gradients = []
    for checkpointed in (False, True):
        encoder, ran = opened(tiny_encoder()).train(), []
        if checkpointed:
            encoder.vision_tower.gradient_checkpointing_enable({"use_reentrant": False})
        encoder.vision_tower.encoder.layers[3].layer_norm1.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        encoder(*tiny_images).square().mean().backward()
        gradients.append([p.grad for p in encoder.cvfm_modules.parameters()])
        assert len(ran) == 1 + checkpointed
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_layers_before_the_first_fusion_record_nothing(tiny_encoder, tiny_images):
    encoder, seen = tiny_encoder(select_layer=-1, fused_after=(2, 3, 4, 5)), []
    for layer in encoder.vision_tower.encoder.layers:
        layer.register_forward_hook(lambda _, __, y: seen.append(y.requires_grad))
    encoder(*tiny_images)
    assert seen == [False, False, True, True, True]


def test_the_layers_past_the_selected_one_do_not_run(tiny_encoder, tiny_images):
    encoder, ran = tiny_encoder(), []
    encoder.vision_tower.encoder.layers[4].register_forward_hook(lambda *_: ran.append(4))
    encoder(*tiny_images)
    assert not ran


@pytest.mark.parametrize("fused_after", [(1, 2, 3), (1, 2, 3, 5), (0, 1, 2, 3), (1, 3, 2, 4), (1, 2, 2, 4)])
def test_layers_that_cannot_be_fused_are_refused(tiny_encoder, fused_after):
    with pytest.raises(ValueError, match="fused_after must name 4 layers from 1 to 4 in order"):
        tiny_encoder(fused_after=fused_after)
    with pytest.raises(ValueError, match="compat must be 'default' or 'reference', not 'other'"):
        CVFM(4, 4, "other")


# ---- tiles ----------------------------------------------------------------------------------------------------------


def test_a_tile_is_fused_with_its_own_window_of_the_canvas(tiny_encoder):
    encoder = opened(tiny_encoder(tiling=True))
    views, canvas = torch.randn(7, 3, 56, 56), torch.randn(3, 256, 256)
    short = torch.randn(3, 128, 128)
    maps = encoder.view_maps([canvas, short])
    assert [stage.shape for stage in maps] == [(7, c, s, s) for c, s in ((8, 32), (12, 16), (16, 8), (24, 4))]
    whole = encoder.stage_maps(canvas[None])
    for stage, full in zip(maps, whole, strict=True):
        side = stage.shape[-1]
        assert torch.equal(stage[3], full[0, :, side:, :side][:, :side, :side])  # global, upper left, upper right, lower left
    assert encoder(views, [canvas, short]).shape == (7, 16, 32)
    with pytest.raises(ValueError, match="images_vit has 7 views, and images_convnext is of 5"):
        encoder(views, [canvas])
    with pytest.raises(ValueError, match=r"sides of n x 128 pixels, not \(256, 200\)"):
        encoder(views, [canvas[:, :, :200]])


def test_the_global_view_of_a_wide_canvas_has_zeros_above_and_below(tiny_encoder):
    encoder = tiny_encoder(tiling=True)
    last = encoder.view_maps([torch.randn(3, 128, 256)])[-1]
    assert last.shape == (3, 24, 4, 4)
    assert not last[0, :, 0].any() and not last[0, :, 3].any() and last[0, :, 1:3].abs().min() > 0
    full = encoder.stage_maps(torch.zeros(1, 3, 128, 256))[-1][0]
    assert windows(full, 2, 1).shape == (2, 24, 4, 4)


def test_tiled_features_are_those_of_each_view_alone(tiny_encoder):
    """Batching images of different canvases changes nothing, and before learning every view is plain CLIP."""
    encoder, views = tiny_encoder(tiling=True), torch.randn(8, 3, 56, 56)
    canvases = [torch.randn(3, 128, 256), torch.randn(3, 256, 256)]
    plain = encoder.vision_tower(views, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(encoder(views, canvases), plain)
    opened(encoder)
    alone = torch.cat([encoder(views[:3], canvases[:1]), encoder(views[3:], canvases[1:])])
    torch.testing.assert_close(encoder(views, canvases), alone, rtol=0, atol=1e-5)


# ---- published weights ----------------------------------------------------------------------------------------------


def published(encoder):
    """The encoder's tensors under the keys of the published code: CLIP nested, ConvNeXt as torchvision's."""
    blocks = {"dwconv": "block.0", "layernorm": "block.2", "pwconv1": "block.3", "pwconv2": "block.5"}
    state = {}
    for key, tensor in encoder.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "vision_tower":
            key = f"vision_tower.vision_tower.vision_model.{rest}"
        elif rest.startswith("embeddings."):
            _, name, leaf = rest.split(".")
            key = f"convnext_encoder.features.0.{0 if name == 'patch_embeddings' else 1}.{leaf}"
        elif "downsampling_layer" in rest:
            _, _, stage, _, place, leaf = rest.split(".")
            key = f"convnext_encoder.features.{2 * int(stage)}.{place}.{leaf}"
        elif part == "convnext_encoder":
            _, _, stage, _, block, name, *leaf = rest.split(".")
            named = ".".join([blocks.get(name, "layer_scale"), *leaf])
            key = f"convnext_encoder.features.{2 * int(stage) + 1}.{block}.{named}"
            tensor = tensor[:, None, None] if named == "layer_scale" else tensor
        state[key] = tensor
    return state


def test_published_keys_load_whole_or_in_parts(tiny_encoder, tiny_images):
    source, target = opened(tiny_encoder(seed=3, compat="reference")), tiny_encoder(seed=4, compat="reference")
    state = published(source)
    load_published(target, {f"model.vision_tower.{key}": tensor for key, tensor in state.items()}, "whole.bin")
    assert torch.equal(source(*tiny_images), target(*tiny_images))

    target = tiny_encoder(seed=3, compat="reference")  # the same towers, other CVFMs
    fusion = {f"model.vision_tower.{key}": tensor for key, tensor in state.items() if key.startswith("cvfm")}
    load_published(target, fusion | {"model.mm_projector.weight": torch.ones(2, 2)}, "stage1_projector_cvfm.bin")
    assert torch.equal(source(*tiny_images), target(*tiny_images))


def test_weights_that_do_not_fit_are_refused_by_name(tiny_encoder):
    encoder = tiny_encoder(compat="reference")
    state = published(encoder)
    with pytest.raises(CheckpointError, match=r"^x: its CVFM has a LayerNorm: the encoder must be made with compat='reference'$"):
        load_published(tiny_encoder(), state, "x")
    with pytest.raises(CheckpointError, match=r"^x: its CVFM lacks a LayerNorm: the encoder must be made with compat='default'$"):
        load_published(encoder, published(tiny_encoder()), "x")
    with pytest.raises(CheckpointError, match="x: holds no part of a hybrid encoder"):
        load_published(encoder, {"model.mm_projector.weight": torch.ones(1)}, "x")
    before = encoder.cvfm_modules[0].gate.clone()
    short = {key: tensor + 1 for key, tensor in state.items() if key != "convnext_encoder.features.2.1.bias"}
    with pytest.raises(CheckpointError, match=r"x: not parts of this hybrid encoder.*stages\.1\.downsampling_layer\.1\.bias"):
        load_published(encoder, short, "x")
    assert torch.equal(encoder.cvfm_modules[0].gate, before)


def test_a_clip_checkpoint_of_hugging_face_is_the_vision_tower(tiny_encoder, tmp_path):
    encoder = tiny_encoder()
    encoder.vision_tower.save_pretrained(tmp_path)
    again = CLIPVisionModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == encoder.vision_tower.state_dict().keys()
