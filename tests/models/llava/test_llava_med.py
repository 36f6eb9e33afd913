"""LLaVA-Med's original layout: what the loaded model computes, and what a wrong checkpoint is answered with."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

from models.checkpoint import CheckpointError
from models.llava.llava_med import load_llava
from models.starter.llava import train_tokenizer

TOKENIZER = train_tokenizer(["Where is the lesion?"])
VOCAB, SIZE = len(TOKENIZER), 28  # tokens of the original vocabulary; pixels of an image, 4 patches


def original_parts(folder):
    """A small CLIP saved under `folder`, a projector and a Mistral: the networks the layout is made of."""
    torch.manual_seed(0)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=14
        )
    )
    vision.save_pretrained(folder)
    text = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            sliding_window=None,
        )
    )
    with torch.no_grad():
        for parameter in [*vision.parameters(), *text.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    projector = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    return vision.eval(), projector, text.eval()


def save_original(folder, vision, projector, text, *, shards=2, with_vision=True):
    """The checkpoint as microsoft/llava-med-v1.5-mistral-7b has it: its config, its keys, several files."""
    state = {f"model.mm_projector.{key}": tensor for key, tensor in projector.state_dict().items()}
    state |= text.state_dict()
    if with_vision:
        tower = {key.removeprefix("vision_model."): tensor for key, tensor in vision.state_dict().items()}
        state |= {f"model.vision_tower.vision_tower.vision_model.{key}": tensor for key, tensor in tower.items()}
        state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    keys, files = sorted(state), {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: state[key].clone() for key in keys[i::shards]}
        save_file(part, folder / name)
        files |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    c = text.config
    config = {name: getattr(c, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config |= {"model_type": "llava_mistral", "vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config |= {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None, "mm_projector_type": "mlp2x_gelu"}
    config |= {"mm_vision_select_layer": -2, "mm_use_im_start_end": False, "mm_vision_tower": str(folder / "clip")}
    (folder / "config.json").write_text(json.dumps(config))
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_med")
    parts = original_parts(folder / "clip")
    return save_original(folder, *parts), parts


def inputs():
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, VOCAB, (2, 6), generator=generator)
    ids = torch.cat([torch.ones(2, 1, dtype=torch.long), torch.full((2, 4), VOCAB), text], 1)
    return ids, torch.randn(2, 3, SIZE, SIZE, generator=generator)


def by_hand(vision, projector, text, ids, pixels):
    """The original forward: CLIP's second to last layer without its class token, projected, in the image's place."""
    with torch.no_grad():
        features = projector(vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
        embeds = text.get_input_embeddings()(ids.clamp(max=VOCAB - 1))
        embeds = torch.cat([embeds[:, :1], features, embeds[:, 5:]], 1)
        return text(inputs_embeds=embeds).logits


def test_the_loaded_model_computes_what_the_original_parts_do(original):
    folder, parts = original
    model, _ = load_llava(str(folder))
    ids, pixels = inputs()
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits
    expected = by_hand(*parts, ids, pixels)
    assert expected.std() > 0.1
    assert torch.allclose(logits[..., :VOCAB], expected, atol=1e-5)
    # the rows the vocabulary was padded with are never the likeliest token
    assert logits.shape[-1] == (VOCAB // 64 + 1) * 64 and (logits.argmax(-1) < VOCAB).all()


def test_the_vision_tower_is_the_checkpoints_unless_openais_is_asked_for(original):
    folder, (vision, projector, text) = original
    own, _ = load_llava(str(folder))
    other, _ = load_llava(str(folder), vision_tower="openai")
    saved = CLIPVisionModel.from_pretrained(folder / "clip").eval()  # differs from the checkpoint's own
    ids, pixels = inputs()
    with torch.no_grad():
        a, b = (model(input_ids=ids, pixel_values=pixels).logits[..., :VOCAB] for model in (own, other))
    assert torch.allclose(b, by_hand(saved, projector, text, ids, pixels), atol=1e-5)
    assert not torch.allclose(a, b, atol=1e-3)


def test_a_checkpoint_without_a_vision_tower_takes_clips(original, tmp_path):
    folder, (vision, projector, text) = original
    vision.save_pretrained(tmp_path / "clip")
    model, _ = load_llava(str(save_original(tmp_path, vision, projector, text, with_vision=False)))
    ids, pixels = inputs()
    with torch.no_grad():
        assert torch.allclose(
            model(input_ids=ids, pixel_values=pixels).logits[..., :VOCAB], by_hand(vision, projector, text, ids, pixels), atol=1e-5
        )


def test_what_is_loaded_can_be_saved_for_hugging_face_and_loaded_again(original, tmp_path):
    model, tokenizer = load_llava(str(original[0]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_llava(str(tmp_path))
    ids, pixels = inputs()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, again(input_ids=ids, pixel_values=pixels).logits)


def change(folder, tmp_path, edit):
    """The checkpoint again, in one file, after `edit(state, config)`."""
    state = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        state |= load_file(shard)
    config = json.loads((folder / "config.json").read_text())
    edit(state, config)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    TOKENIZER.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s, c: s.pop("model.layers.1.mlp.up_proj.weight"), r"language_model\.layers\.1\.mlp\.up_proj\.weight missing"),
        (lambda s, c: s.update({"model.image_newline": torch.zeros(2)}), r"unexpected key model\.image_newline"),
        (
            lambda s, c: s.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}),
            r"layers\.7\.mlp\.up_proj\.weight unexpected",
        ),
        (lambda s, c: s.update({"model.mm_projector.0.bias": torch.zeros(3)}), r"linear_1\.bias is \[3\] instead of \[64\]"),
        (lambda s, c: s.pop("model.vision_tower.vision_tower.vision_model.post_layernorm.bias"), r"post_layernorm\.bias missing"),
        (lambda s, c: c.update(mm_projector_type="linear"), r"'mm_projector_type': 'linear'"),
        (lambda s, c: c.update(model_type="qwen2_vl"), r"model_type 'qwen2_vl'; a LLaVA"),
    ],
)
def test_a_wrong_checkpoint_is_an_error_that_names_what_is_wrong(original, tmp_path, edit, message):
    with pytest.raises(CheckpointError, match=message):
        load_llava(change(original[0], tmp_path, edit))


def test_a_place_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(OSError, match="expected a folder with config.json"):
        load_llava(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llava_mistral"}')
    with pytest.raises(CheckpointError, match="expected checkpoint or openai"):
        load_llava(str(tmp_path), vision_tower="mine")
