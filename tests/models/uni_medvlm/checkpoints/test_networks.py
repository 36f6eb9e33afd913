"""A model from published folders and files on disk: each network as it is there, nothing copied, and what cannot be used named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models.checkpoint import CheckpointError
from models.sam.sam import lite_medsam
from models.starter.encoder import starter_sam
from models.starter.llava import train_tokenizer
from models.starter.uni_medvlm import CONVNEXT, FUSED_AFTER, VIT
from models.uni_medvlm.checkpoints.loading import load_pretrained
from models.uni_medvlm.checkpoints.networks import build_unimed, load_convnext, load_visual_model
from models.uni_medvlm.encoder.hybrid_encoder import convnext_large, vit_large
from models.uni_medvlm.experts import add_experts
from models.uni_medvlm.model import UniMedConfig
from models.uni_medvlm.stages.artifacts import load_stage2, save_stage2
from models.uni_medvlm.stages.trainable import prepare_stage
from tests.models.uni_medvlm.small_unimed import CORPUS, LORA, changed, disturb, equal, outputs, train
from tests.models.uni_medvlm.test_hybrid_encoder import published

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = ("<unk>", "<s>", "</s>")


def save_llm(folder, model_class=LlamaForCausalLM, config_class=LlamaConfig, padding=0, special=SPECIAL, **settings):
    tokenizer = train_tokenizer(CORPUS, 300, special)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = model_class(config_class(vocab_size=len(tokenizer) + padding, **ids, **(settings or SIZES)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Keyword arguments of `build_unimed`: a Llama, a CLIP, a ConvNeXt and a SAM on disk."""
    folder = tmp_path_factory.mktemp("published")
    save_llm(folder / "llm")
    torch.manual_seed(1)
    CLIPVisionModel(vit_large(**VIT)).save_pretrained(folder / "clip")
    ConvNextForImageClassification(convnext_large(**CONVNEXT)).save_pretrained(folder / "convnext")
    torch.save({"model": starter_sam().state_dict()}, folder / "sam.pth")
    return {
        "llm": folder / "llm",
        "vision_tower": folder / "clip",
        "convnext": folder / "convnext",
        "sam_ckpt": folder / "sam.pth",
        "fused_after": FUSED_AFTER,
        "sam": "starter",
    }


@pytest.fixture
def copied(folders, tmp_path):
    """The same, to be spoilt."""
    shutil.copytree(folders["llm"].parent, tmp_path / "published")
    return {name: tmp_path / "published" / value.name if hasattr(value, "name") else value for name, value in folders.items()}


def test_each_network_is_that_of_its_folder_and_what_is_new_is_between_them(folders):
    model = build_unimed(**folders).model
    state = model.state_dict()
    theirs = {f"language_model.{key}": x for key, x in load_file(folders["llm"] / "model.safetensors").items()}
    theirs |= {f"vision_tower.vision_tower.{key}": x for key, x in load_file(folders["vision_tower"] / "model.safetensors").items()}
    convnext = load_file(folders["convnext"] / "model.safetensors").items()
    left_out = ("classifier.", "convnext.layernorm.")
    inner = {key.removeprefix("convnext."): x for key, x in convnext if not key.startswith(left_out)}
    theirs |= {f"vision_tower.convnext_encoder.{key}": x for key, x in inner.items()}
    theirs |= {f"visual_model.{key}": x for key, x in torch.load(folders["sam_ckpt"], weights_only=True)["model"].items()}
    assert all(torch.equal(state[key], tensor) for key, tensor in theirs.items())
    new = {key.split(".")[0] for key in state.keys() - theirs.keys()} - {"vision_tower"}
    assert new == {"mm_projector", "region_fea_adapter", "text_hidden_fcs", "token_rows"}
    assert {key.split(".")[1] for key in state.keys() - theirs.keys() if key.startswith("vision")} == {"cvfm_modules"}
    assert model.origin.llm == str(folders["llm"]) and model.origin.sam_ckpt == str(folders["sam_ckpt"])


def test_a_whole_clip_and_torchvisions_file_are_the_same_networks(folders, tmp_path):
    expected = build_unimed(**folders)
    torch.manual_seed(2)
    clip = CLIPModel(CLIPConfig(vision_config={**VIT, "hidden_act": "quick_gelu"}, text_config=SMALL_TEXT))
    clip.vision_model.load_state_dict(expected.model.vision_tower.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    encoder = expected.model.vision_tower
    part = "convnext_encoder."
    state = {key.removeprefix(part): tensor for key, tensor in published(encoder).items() if key.startswith(part)}
    head = {"classifier.0.weight": torch.ones(64), "classifier.2.weight": torch.zeros(9, 64), "classifier.2.bias": torch.zeros(9)}
    torch.save(state | head, tmp_path / "convnext_small.pth")
    other = build_unimed(**folders | {"vision_tower": tmp_path / "clip", "convnext": tmp_path / "convnext_small.pth"})
    mine, theirs = expected.model.vision_tower.state_dict(), other.model.vision_tower.state_dict()
    towers = [key for key in mine if "cvfm" not in key]
    assert towers and all(torch.equal(mine[key], theirs[key]) for key in towers)


SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def test_a_checkpoint_names_its_networks_and_does_not_copy_them(folders, tmp_path):
    policy = build_unimed(**folders)
    prepare_stage(policy.model, 2, LORA)
    train(policy)
    policy.model.save_pretrained(tmp_path / "whole")
    keys = set(load_file(tmp_path / "whole" / "model.safetensors"))
    parts = ("mm_projector.", "region_fea_adapter.", "text_hidden_fcs.", "token_rows.", "vision_tower.cvfm_modules.")
    assert keys and all(key.startswith((*parts, "visual_model.mask_decoder.")) for key in keys)
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders["llm"])
    again = load_pretrained(tmp_path / "whole")
    assert equal(outputs(again), outputs(policy))


def test_a_changed_language_model_is_in_the_checkpoint(folders, tmp_path):
    """Stage 2's adapters are merged into it, then it gets experts: its layers are then nowhere else."""
    policy = build_unimed(**folders)
    prepare_stage(policy.model, 2, LORA)
    disturb(policy.model)
    save_stage2(policy.model, tmp_path / "stage2")
    merged = build_unimed(**folders)
    load_stage2(merged.model, tmp_path / "stage2")
    for _ in range(2):
        merged.model.save_pretrained(tmp_path / "whole")
        shutil.rmtree(tmp_path / "stage2", ignore_errors=True)
        assert equal(outputs(load_pretrained(tmp_path / "whole")), outputs(merged))
        keys = [key for key in load_file(tmp_path / "whole" / "model.safetensors") if key.startswith("language_model.")]
        assert keys and all(".layers." in key for key in keys)
        if merged.model.ledger is None:
            merged.model.ledger = add_experts(merged.model.llm.get_decoder(), 2)


def test_a_network_that_learns_itself_is_in_the_checkpoint_too(folders, tmp_path):
    policy = build_unimed(**folders)
    policy.model.vision_tower.convnext_encoder.requires_grad_(True)
    disturb(policy.model.vision_tower.convnext_encoder)
    policy.model.save_pretrained(tmp_path / "whole")
    again = load_pretrained(tmp_path / "whole")
    assert equal(outputs(again), outputs(policy))
    fresh = build_unimed(**folders)
    before = {name: tensor.clone() for name, tensor in fresh.model.state_dict().items()}
    fresh.model.load_trained(tmp_path / "whole")
    assert any("convnext_encoder" in name for name in changed(fresh, before)) and equal(outputs(fresh), outputs(policy))


def test_networks_that_have_moved_are_named_and_may_be_named_anew(copied, tmp_path):
    policy = build_unimed(**copied)
    policy.model.save_pretrained(tmp_path / "whole")
    moved, file = tmp_path / "moved", tmp_path / "whole" / "unimed.json"
    shutil.move(copied["llm"].parent, moved)
    for name, inner in {"llm": "llm", "vision_tower": "clip", "convnext": "convnext", "sam_ckpt": "sam.pth"}.items():
        with pytest.raises((OSError, CheckpointError), match=f"{copied[name]}.*; {file} says that its {name} lies there") as error:
            load_pretrained(tmp_path / "whole")
        assert "\n" not in str(error.value)
        settings = json.loads(file.read_text())
        settings["origin"][name] = str(moved / inner)
        file.write_text(json.dumps(settings))
    assert equal(outputs(load_pretrained(tmp_path / "whole")), outputs(policy))


@pytest.mark.parametrize("kind", [(MistralForCausalLM, MistralConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_other_language_models_of_llamas_kind_and_padded_ones_will_do(folders, tmp_path, kind):
    sliding = {"sliding_window": None} if kind[1] is MistralConfig else {}
    policy = build_unimed(**folders | {"llm": save_llm(tmp_path / "llm", *kind, padding=7, **SIZES, **sliding)})
    logits, *_ = outputs(policy)
    assert logits.shape[-1] == policy.model.start + 5 < policy.model.llm.config.vocab_size and logits.isfinite().all()
    policy.model.save_pretrained(tmp_path / "whole")
    assert equal(outputs(load_pretrained(tmp_path / "whole")), outputs(policy))


def test_tied_embeddings_stay_tied(folders, tmp_path):
    policy = build_unimed(**folders | {"llm": save_llm(tmp_path / "llm", **SIZES, tie_word_embeddings=True)})
    policy.model.origin.llm = None  # as if it lay nowhere else
    policy.model.save_pretrained(tmp_path / "whole")
    again = load_pretrained(tmp_path / "whole")
    assert equal(outputs(again), outputs(policy))
    assert again.model.llm.get_input_embeddings().weight is again.model.llm.get_output_embeddings().weight


def test_the_published_options_are_kept(folders, tmp_path):
    settings = {"projector": "mlp2x_gelu", "tiling": True, "compat": "reference"}
    policy = build_unimed(**folders, **settings, dtype=torch.bfloat16)
    policy.model.save_pretrained(tmp_path / "whole")
    again = load_pretrained(tmp_path / "whole")
    assert again.model.settings == UniMedConfig(**settings) and again.processor.tiling and again.model.llm.dtype == torch.bfloat16
    assert equal(outputs(again), outputs(policy))
    assert {parameter.dtype for parameter in policy.model.mm_projector.parameters()} == {torch.float32}


# ---- what cannot be used ---------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(folders, tmp_path):
    for name in ("llm", "vision_tower", "convnext", "sam_ckpt"):
        with pytest.raises((OSError, CheckpointError), match=f"{tmp_path}/gone"):
            build_unimed(**folders | {name: tmp_path / "gone"})
    with pytest.raises(OSError, match="gone.pth: no such file"):
        load_convnext(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="no SAM is called 'sam_9000'"):
        build_unimed(**folders | {"sam": "sam_9000"})


def test_networks_of_another_kind_are_refused(folders, tmp_path):
    BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(
        tmp_path / "bert"
    )
    for name, said in (
        ("llm", "no causal language model|lacks|no tokenizer|not its weights"),
        ("vision_tower", "no CLIP .model_type 'bert'"),
        ("convnext", "no ConvNeXt .model_type 'bert'"),
    ):
        with pytest.raises(CheckpointError, match=said) as error:
            build_unimed(**folders | {name: tmp_path / "bert"})
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="no causal language model .model_type 'convnext'"):
        build_unimed(**folders | {"llm": folders["convnext"]})
    gpt = save_llm(tmp_path / "gpt", GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(CheckpointError, match="its layers are not of Llama's kind"):
        build_unimed(**folders | {"llm": gpt})
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    qwen = save_llm(tmp_path / "sliding", Qwen2ForCausalLM, Qwen2Config, **SIZES, **sliding)
    with pytest.raises(CheckpointError, match="sliding-window attention is not supported"):
        build_unimed(**folders | {"llm": qwen})
    own = save_llm(tmp_path / "own", special=(*SPECIAL, "<image>"))
    with pytest.raises(CheckpointError, match="has a token <image> of its own"):
        build_unimed(**folders | {"llm": own})
    with pytest.raises(CheckpointError, match="fused_after must name 4 layers"):
        build_unimed(**{name: value for name, value in folders.items() if name != "fused_after"})


def test_weights_that_do_not_fit_are_refused(copied, tmp_path):
    for name in ("llm", "vision_tower", "convnext"):
        file = copied[name] / "model.safetensors"
        state = load_file(file)
        key = next(key for key in sorted(state) if "layer" in key)
        save_file({other: tensor for other, tensor in state.items() if other != key}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match="missing"):
            build_unimed(**copied)
        save_file(state, file, {"format": "pt"})
    torch.save({"features.1.0.block.0.weight": torch.zeros(4, 1, 7, 7)}, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"no ConvNeXt of torchvision .expected features.3.0.block.0.weight"):
        load_convnext(tmp_path / "short.pth")
    state = torch.load(copied["sam_ckpt"], weights_only=True)["model"]
    state.pop("mask_decoder.iou_token.weight")
    torch.save(state, copied["sam_ckpt"])
    with pytest.raises(CheckpointError, match="sam.pth: not a checkpoint of starter: mask_decoder.iou_token.weight missing"):
        build_unimed(**copied)
    with pytest.raises(CheckpointError, match="not a checkpoint of lite_medsam"):
        build_unimed(**copied | {"sam": "lite_medsam"})


def test_a_published_sam_is_read_from_its_file(tmp_path):
    torch.manual_seed(4)
    sam = lite_medsam()
    torch.save({"model": {f"module.{key}": tensor for key, tensor in sam.state_dict().items()}}, tmp_path / "lite_medsam.pth")
    loaded = load_visual_model("lite_medsam", tmp_path / "lite_medsam.pth").state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in sam.state_dict().items())
