"""Each stage changes exactly what it may, in real steps of an optimizer; all other tensors stay bit for bit."""

import re

import pytest
import torch
from peft import PeftModel

from models.uni_medvlm.experts import ExpertLoRA, add_experts
from models.uni_medvlm.model import UniMedConfig
from models.uni_medvlm.stages.artifacts import load_stage1
from models.uni_medvlm.stages.merged_experts import build_experts
from models.uni_medvlm.stages.trainable import prepare_stage, trainable_names
from tests.models.uni_medvlm.small_unimed import changed, computed, equal, outputs, small_unimed, train

FFN, ATTENTION = "gate|up|down", "q|k|v|o"
HEADS = r"visual_model\.mask_decoder\..*|text_hidden_fcs\..*|token_rows\.(input|head)"
MAY_CHANGE = {
    1: r"vision_tower\.cvfm_modules\..*|mm_projector\.(weight|bias)",
    2: rf"language_model\..*\.({ATTENTION}|{FFN})_proj\.lora_[AB]\..*|region_fea_adapter\.(weight|bias)",
    3: rf"language_model\..*\.mlp\.({FFN})_proj\.lora_[AB]\..*|{HEADS}",
    4: rf"language_model\..*\.mlp\.(router|experts\.\d\.({FFN})_proj\.lora_[AB]\..*)|region_fea_adapter\..*|{HEADS}",
    5: rf"language_model\..*\.(self_attn\.({ATTENTION})_proj|mlp\.experts\.\d\.({FFN})_proj)\.lora_[AB]\..*",
}
# What has no gradient but rounding's: the decoder's tokens for three masks of one point, which a mask for text never asks for, and
# what its keys have in common, which a softmax does not see.
IDLE = re.compile(r"visual_model\.mask_decoder\.(output_hypernetworks_mlps\.[123]\.|transformer\..*\.k_proj\.bias)")


def prepared(stage, stages, **lora):
    policy = small_unimed()
    load_stage1(policy.model, stages["stage1"])
    if stage >= 4:
        build_experts(policy.model, stages["stage2"], stages["stage3"])
    prepare_stage(policy.model, stage, **lora)
    return policy


@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
def test_a_stage_changes_exactly_what_it_may(stage, stages):
    policy = prepared(stage, stages)
    may = {name for name, _ in policy.model.named_parameters() if re.fullmatch(MAY_CHANGE[stage], name)}
    assert may and set(trainable_names(policy.model)) == may
    before = train(policy)
    found = changed(policy, before)
    assert found <= may and all(IDLE.match(name) for name in may - found)


@pytest.mark.parametrize("stage", [2, 3, 5])
def test_new_adapters_have_the_published_ranks_and_no_effect(stage, stages):
    expected = {2: (128, 256), 3: (8, 16), 5: (8, 16)}[stage]
    policy = small_unimed()
    load_stage1(policy.model, stages["stage1"])
    if stage == 5:
        build_experts(policy.model, stages["stage2"], stages["stage3"])
    without = outputs(policy)
    prepare_stage(policy.model, stage)
    assert equal(outputs(policy), without)
    layer = policy.model.llm.get_decoder().layers[0]
    adapted = layer.self_attn.q_proj if stage != 3 else layer.mlp.up_proj
    assert (adapted.r["default"], adapted.lora_alpha["default"], adapted.lora_dropout["default"].p) == (*expected, 0.05)
    assert isinstance(policy.model.language_model, PeftModel) == (stage != 5)


def test_what_learns_is_float32_beside_a_bfloat16_language_model(stages):
    for stage in (2, 3, 4, 5):
        policy = small_unimed()
        load_stage1(policy.model, stages["stage1"])
        policy.model.language_model.bfloat16()
        if stage >= 4:
            build_experts(policy.model, stages["stage2"], stages["stage3"])
        prepare_stage(policy.model, stage)
        assert {parameter.dtype for parameter in policy.model.parameters() if parameter.requires_grad} == {torch.float32}
        assert all(out.isfinite().all() for out in computed(policy))


def test_whole_experts_learn_in_stage_4(stages):
    policy = small_unimed()
    policy.model.ledger = add_experts(policy.model.llm.get_decoder(), 2)
    names = prepare_stage(policy.model, 4)
    assert "language_model.model.layers.1.mlp.experts.1.down_proj.weight" in names
    found = changed(policy, train(policy))
    assert found <= {*names} and all(IDLE.match(name) for name in {*names} - found)


def test_a_stage_goes_on_from_adapters_that_are_there(stages):
    policy = prepared(5, stages)
    train(policy)
    learnt, names = outputs(policy), trainable_names(policy.model)
    assert prepare_stage(policy.model, 5) == names and equal(outputs(policy), learnt)


def test_stages_that_cannot_be_are_refused(stages):
    policy = small_unimed()
    with pytest.raises(ValueError, match="there are stages 1 to 5, not 6"):
        prepare_stage(policy.model, 6)
    for stage in (4, 5):
        with pytest.raises(ValueError, match=f"stage {stage}: the language model has no experts"):
            prepare_stage(policy.model, stage)
    prepare_stage(policy.model, 2, ExpertLoRA(2, 4, 0.0))
    with pytest.raises(ValueError, match="stage 3: the language model has adapters already: merge them first"):
        prepare_stage(policy.model, 3)
    mixed = small_unimed()
    mixed.model.ledger = add_experts(mixed.model.llm.get_decoder(), 2)
    with pytest.raises(ValueError, match="stage 2: the language model has experts"):
        prepare_stage(mixed.model, 2)


def test_the_published_counts_of_stages_1_and_3():
    """Of the real sizes, on the meta device: 49.6 M in stage 1, and the mask decoder's 4,058,340 in stage 3."""
    from transformers import CLIPVisionModel, ConvNextModel, LlamaConfig, LlamaForCausalLM

    from models.sam.sam import sam_med2d
    from models.uni_medvlm.encoder.hybrid_encoder import HybridEncoder, convnext_large, vit_large
    from models.uni_medvlm.model import UniMedVLM

    with torch.device("meta"):
        encoder = HybridEncoder(CLIPVisionModel(vit_large()), ConvNextModel(convnext_large()), compat="reference")
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=4096, num_hidden_layers=1, intermediate_size=64))
        model = UniMedVLM(encoder, llama, sam_med2d(), 100, UniMedConfig(compat="reference"))
        prepare_stage(model, 1)
        assert sum(x.numel() for x in model.parameters() if x.requires_grad) == 45_379_588 + 4_198_400
        names = prepare_stage(model, 3)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name in names}
    assert sum(size for name, size in sizes.items() if "mask_decoder" in name) == 4_058_340
    assert sum(size for name, size in sizes.items() if "text_hidden_fcs" in name) == 4096 * 256 + 256
