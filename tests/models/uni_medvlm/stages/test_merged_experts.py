"""Stage 4's experts are the FFNs that stages 3 and 2 came to, beside stage 2's attention."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import CheckpointError
from models.uni_medvlm.experts import ExpertLoRA, MixtureOfExperts, RoutingOptions
from models.uni_medvlm.stages.artifacts import load_grounding, load_stage1, load_stage2, load_stage3
from models.uni_medvlm.stages.merged_experts import build_experts
from models.uni_medvlm.stages.trainable import prepare_stage
from tests.models.uni_medvlm.small_unimed import LORA, outputs, small_unimed

FFN, ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


def change(folder, layer, name):
    """What an adapter adds to a layer's weight: alpha / r B A."""
    room = "mlp" if name in FFN else "self_attn"
    state = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.model.layers.{layer}.{room}.{name}"
    return LORA.alpha / LORA.r * state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]


def with_experts(stages, stage3="stage3", **options):
    policy = small_unimed()
    load_stage1(policy.model, stages["stage1"])
    build_experts(policy.model, stages["stage2"], stages[stage3], **options)
    policy.model.eval()
    return policy


def force(policy, expert):
    """Route every token to one expert, with the weight 1."""
    for layer in policy.model.llm.get_decoder().layers:
        layer.mlp.experts = torch.nn.ModuleList([layer.mlp.experts[expert]] * 2)


@pytest.mark.parametrize("stage3", ["stage3", "stage3_alone"])
def test_experts_and_attention_are_the_merged_ones(stages, stage3):
    base, policy = small_unimed().model.llm.get_decoder().layers, with_experts(stages, stage3)
    for number, layer in enumerate(policy.model.llm.get_decoder().layers):
        for name in FFN:
            plain = getattr(base[number].mlp, name).weight
            question = plain + change(stages["stage2"], number, name)
            grounding = (question if stage3 == "stage3" else plain) + change(stages[stage3], number, name)
            for expert, expected in enumerate((grounding, question)):
                own = getattr(layer.mlp.experts[expert], name)
                torch.testing.assert_close(own.base_layer.weight, expected, rtol=0, atol=1e-6)
                assert not own.lora_B["default"].weight.any() and (own.r["default"], own.lora_alpha["default"]) == (8, 16)
        for name in ATTENTION:
            expected = getattr(base[number].self_attn, name).weight + change(stages["stage2"], number, name)
            torch.testing.assert_close(getattr(layer.self_attn, name).weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("expert", [0, 1])
def test_each_expert_alone_is_the_model_of_its_stage(stages, expert):
    """Words and mask of stage 3's model, words of stage 2's."""
    policy, stage = with_experts(stages), small_unimed()
    load_stage1(stage.model, stages["stage1"])
    load_stage2(stage.model, stages["stage2"])
    load_grounding(stage.model, stages["stage3"])
    if expert == 0:
        load_stage3(stage.model, stages["stage3"])
    force(policy, expert)
    (words, mask, iou), theirs = outputs(policy), outputs(stage)
    torch.testing.assert_close(words[1], theirs[0][1], rtol=1e-4, atol=1e-4)
    if expert == 0:  # after its end the first answer is padding, which goes to no expert
        torch.testing.assert_close((words[0, :2], mask, iou), (theirs[0][0, :2], *theirs[1:]), rtol=1e-4, atol=1e-4)


def test_some_layers_may_have_experts(stages):
    policy = with_experts(stages, layers=[1], options=RoutingOptions(1), lora=ExpertLoRA(2, 4, 0.0))
    first, second = policy.model.llm.get_decoder().layers
    assert isinstance(second.mlp, MixtureOfExperts) and second.mlp.options.top_k == 1
    expected = small_unimed().model.llm.get_decoder().layers[0].mlp.up_proj.weight + change(stages["stage2"], 0, "up_proj")
    torch.testing.assert_close(first.mlp.up_proj.weight, expected, rtol=0, atol=1e-6)
    assert all(out.isfinite().all() for out in outputs(policy)) and list(policy.model.ledger.routings) == [1]


def test_what_cannot_become_experts_is_refused(stages, tmp_path):
    with pytest.raises(ValueError, match=r"layers must be some of 0 to 1, not \[1, 2\]"):
        with_experts(stages, layers=[2, 1])
    policy = with_experts(stages)
    with pytest.raises(ValueError, match="from a bare language model"):
        build_experts(policy.model, stages["stage2"], stages["stage3"])
    adapted = small_unimed()
    prepare_stage(adapted.model, 2, LORA)
    with pytest.raises(ValueError, match="from a bare language model"):
        build_experts(adapted.model, stages["stage2"], stages["stage3"])
    with pytest.raises(OSError, match="nothing of stage 3 there .*python -m recipes.unimed_stage3_grounding"):
        build_experts(small_unimed().model, stages["stage2"], tmp_path / "gone")
    with pytest.raises(OSError, match="nothing of stage 2 there .*python -m recipes.unimed_stage2_vqa"):
        build_experts(small_unimed().model, stages["stage1"], stages["stage3"])


def test_stage_3s_adapters_must_leave_the_attention_alone(stages, tmp_path):
    shutil.copytree(stages["stage3"], tmp_path / "stage3")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(stages["stage2"] / name, tmp_path / "stage3")
    with pytest.raises(
        CheckpointError, match="adapts k_proj, o_proj, q_proj, v_proj: expected gate_proj, up_proj, down_proj alone"
    ):
        build_experts(small_unimed().model, stages["stage2"], tmp_path / "stage3")


def test_a_gate_that_peft_cannot_merge_is_one_line(stages, tmp_path):
    shutil.copytree(stages["stage2"], tmp_path / "stage2")
    file = tmp_path / "stage2" / "adapter_model.safetensors"
    save_file({key: tensor * 1e30 for key, tensor in load_file(file).items()}, file)
    config = tmp_path / "stage2" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    with pytest.raises(CheckpointError, match="cannot be used .ValueError: NaNs detected") as error:
        build_experts(small_unimed().model, tmp_path / "stage2", stages["stage3"])
    assert "\n" not in str(error.value)
