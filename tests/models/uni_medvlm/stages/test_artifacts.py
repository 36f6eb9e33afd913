"""What stages 1 to 3 leave has the documented names and keys, comes back bit for bit, and is refused by name where it is wrong."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from models.checkpoint import CheckpointError
from models.uni_medvlm.stages.artifacts import (
    COMMANDS,
    load_regions,
    load_stage1,
    load_stage2,
    load_stage3,
    save_stage1,
    save_stage2,
    save_stage3,
)
from models.uni_medvlm.stages.trainable import prepare_stage
from tests.models.uni_medvlm.small_unimed import LORA, batch_of, changed, disturb, equal, outputs, small_unimed, train

ADAPTERS = {"adapter_model.safetensors", "adapter_config.json"}
FILES = {
    "stage1": {"stage1_projector_cvfm.bin"},
    "stage2": ADAPTERS | {"non_lora_trainables.bin"},
    "stage3": ADAPTERS | {"stage3_grounding_weights.bin", "stage3.json"},
}
LOAD = {"stage1": load_stage1, "stage2": load_stage2, "stage3": load_stage3}
PARTS = {
    "stage1_projector_cvfm.bin": ("model.mm_projector.", "model.vision_tower.cvfm_modules."),
    "non_lora_trainables.bin": ("model.region_fea_adapter.",),
    "stage3_grounding_weights.bin": ("model.visual_model.mask_decoder.", "model.text_hidden_fcs.", "model.token_rows."),
}


def tensors(file):
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_leaves_the_documented_files_with_the_documented_keys(stages, stage):
    folder = stages[f"stage{stage}"]
    assert {file.name for file in folder.iterdir()} == FILES[f"stage{stage}"]
    model = small_unimed().model
    for file in folder.glob("*.bin"):
        expected = {f"model.{key}" for key in model.state_dict() if f"model.{key}".startswith(PARTS[file.name])}
        assert set(tensors(file)) == expected and {x.device.type for x in tensors(file).values()} == {"cpu"}
    if stage > 1:
        keys = set(load_file(folder / "adapter_model.safetensors"))
        names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in keys}
        layers = {name for name, module in model.language_model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert names == {x for x in layers if x != "lm_head" and (stage == 2 or ".mlp." in x)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_real_step_has_taught_comes_back_bit_for_bit_and_nothing_else_changes(stages, stage, tmp_path):
    taught = small_unimed()
    load_stage1(taught.model, stages["stage1"])
    prepare_stage(taught.model, stage, LORA)
    train(taught)
    {1: save_stage1, 2: save_stage2, 3: save_stage3}[stage](taught.model, tmp_path / "out")
    other = small_unimed(seed=1)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    load = {1: load_stage1, 2: lambda *args: load_stage2(*args, merge=False), 3: load_stage3}[stage]
    load(other.model, tmp_path / "out")
    trained = {name for name, parameter in taught.model.named_parameters() if parameter.requires_grad}
    theirs, ours = taught.model.state_dict(), other.model.state_dict()
    assert trained and all(torch.equal(theirs[name], ours[name]) for name in trained)
    kept = {name: ours[name] for name in ours.keys() - trained}
    plain = {name.replace("base_model.model.", "").replace(".base_layer", ""): tensor for name, tensor in kept.items()}
    assert plain.keys() == before.keys() - trained and all(torch.equal(before[name], plain[name]) for name in plain)


def test_stage_2s_folder_is_an_adapter_that_peft_reads(stages):
    policy, plain = small_unimed(), small_unimed()
    load_stage1(policy.model, stages["stage1"])
    load_stage2(policy.model, stages["stage2"], merge=False)
    llama = LlamaForCausalLM(plain.model.llm.config)
    llama.load_state_dict(plain.model.llm.state_dict())
    adapted = PeftModel.from_pretrained(llama, stages["stage2"])
    own, theirs = policy.model.language_model.state_dict(), adapted.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def test_merged_adapters_compute_what_adapters_do(stages):
    around, merged = small_unimed(), small_unimed()
    load_stage2(around.model, stages["stage2"], merge=False)
    load_stage2(merged.model, stages["stage2"])
    assert not isinstance(merged.model.language_model, PeftModel) and merged.model.origin.merged == str(stages["stage2"])
    for ours, theirs in zip(outputs(merged), outputs(around), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(merged)[0], outputs(small_unimed())[0], atol=1e-2)


def test_a_region_is_read_through_what_stage_2_learnt(stages):
    first, second = small_unimed(), small_unimed()
    load_regions(second.model, stages["stage2"])
    a, b = outputs(first)[0], outputs(second)[0]
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])  # the second prompt has a region
    assert [len(image.regions) for image in batch_of(first).shown] == [0, 1]


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "base_model.model.model.", ""])
def test_published_prefixes_of_stage_1_are_known(stages, prefix, tmp_path):
    state = {
        prefix + key.removeprefix("model."): x.half() for key, x in tensors(stages["stage1"] / "stage1_projector_cvfm.bin").items()
    }
    torch.save(state, tmp_path / "published.bin")
    policy = small_unimed(seed=2)
    load_stage1(policy.model, tmp_path / "published.bin")
    assert torch.equal(policy.model.mm_projector.weight, state[f"{prefix}mm_projector.weight"].float())
    assert torch.equal(policy.model.vision_tower.cvfm_modules[1].gate, state[f"{prefix}vision_tower.cvfm_modules.1.gate"].float())


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_missing_artifact_is_one_line_that_names_the_command(stages, stage, tmp_path):
    name = f"stage{stage}"
    for missing in sorted(FILES[name]):
        folder = tmp_path / missing
        shutil.copytree(stages[name], folder)
        (folder / missing).unlink()
        policy = small_unimed()
        if stage == 3:
            load_stage2(policy.model, stages["stage2"])
        with pytest.raises(
            OSError, match=f"nothing of stage {stage} there .expected {missing}; make it with: {COMMANDS[stage]}"
        ) as error:
            LOAD[name](policy.model, folder)
        assert "\n" not in str(error.value)
    with pytest.raises(
        OSError, match=f"gone: nothing of stage {stage} there .*make it with: python -m recipes.unimed_stage{stage}_"
    ):
        LOAD[name](small_unimed().model, tmp_path / "gone")


def wrong(state, how):
    key = sorted(state)[0]
    if how == "missing":
        del state[key]
    elif how == "unexpected":
        state["model.lm_head.weight"] = torch.zeros(2)
    elif how == "shape":
        state[key] = torch.zeros(7, 7)
    else:
        state[key].view(-1)[0] = float("nan")
    return state


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("how", "said"), [("missing", "missing"), ("unexpected", "unexpected"), ("shape", "instead of"), ("nan", "is not finite")]
)
def test_wrong_tensors_are_refused_by_name_and_change_nothing(stages, stage, how, said, tmp_path):
    folder = tmp_path / "wrong"
    shutil.copytree(stages[f"stage{stage}"], folder)
    [file] = folder.glob("*.bin")
    torch.save(wrong(tensors(file), how), file)
    policy = small_unimed()
    if stage == 3:
        load_stage2(policy.model, stages["stage2"])
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said) as error:
        LOAD[f"stage{stage}"](policy.model, folder)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert not changed(policy, before)


def test_adapters_of_another_language_model_are_refused(stages):
    with pytest.raises(CheckpointError, match="not adapters of this model: they adapt .*layers.1.* missing in it"):
        load_stage2(small_unimed(num_layers=1).model, stages["stage2"])
    with pytest.raises(CheckpointError, match="region_fea_adapter.weight is .64, 64. instead of .128, 64."):
        load_stage2(small_unimed(hidden_size=128).model, stages["stage2"])


def test_adapters_with_missing_or_broken_weights_are_refused(stages, tmp_path):
    for how, said in (("missing", "missing"), ("nan", "is not finite")):
        folder = tmp_path / how
        shutil.copytree(stages["stage2"], folder)
        file = folder / "adapter_model.safetensors"
        save_file(wrong(load_file(file), how), file)
        with pytest.raises(CheckpointError, match=said):
            load_stage2(small_unimed().model, folder)


def test_no_code_of_a_pickle_is_run(stages, tmp_path):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"model.mm_projector.weight": Harm()}, tmp_path / "stage1_projector_cvfm.bin")
    with pytest.raises(CheckpointError, match="not a file of tensors alone"):
        load_stage1(small_unimed().model, tmp_path)


def test_the_published_cvfm_and_ours_are_told_apart(stages):
    with pytest.raises(CheckpointError, match="lacks a LayerNorm: the encoder must be made with compat='default'"):
        load_stage1(small_unimed(compat="reference").model, stages["stage1"])


def test_another_projector_is_told_by_its_keys(stages):
    policy = small_unimed()
    policy.model.mm_projector = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    with pytest.raises(CheckpointError, match=r"mm_projector\.0\.weight.* missing; mm_projector\.weight, .* unexpected"):
        load_stage1(policy.model, stages["stage1"])


def test_stage_3_knows_which_language_model_it_began_with(stages, tmp_path):
    alone = small_unimed()
    load_stage3(alone.model, stages["stage3_alone"])
    with pytest.raises(ValueError, match="began with stage 2's adapters in the language model, which is without them here"):
        load_stage3(small_unimed().model, stages["stage3"])
    merged = small_unimed()
    load_stage2(merged.model, stages["stage2"])
    with pytest.raises(ValueError, match="began without stage 2's adapters in the language model, which is with them here"):
        load_stage3(merged.model, stages["stage3_alone"])
    shutil.copytree(stages["stage3"], tmp_path / "stage3")
    (tmp_path / "stage3" / "stage3.json").write_text(json.dumps({"merged": "yes"}))
    with pytest.raises(CheckpointError, match="merged is 'yes': expected true or false"):
        load_stage3(merged.model, tmp_path / "stage3")


def test_without_adapters_there_is_nothing_of_stages_2_and_3_to_save(tmp_path):
    for save, stage in ((save_stage2, 2), (save_stage3, 3)):
        with pytest.raises(ValueError, match=f"no adapters, so there are none of stage {stage}"):
            save(small_unimed().model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_artifact_is_written_again_whole(stages, tmp_path):
    policy = small_unimed()
    load_stage1(policy.model, stages["stage1"])
    prepare_stage(policy.model, 2, LORA)
    for _ in range(2):
        disturb(policy.model)
        save_stage2(policy.model, tmp_path / "stage2")
    again = small_unimed()
    load_stage1(again.model, stages["stage1"])
    load_stage2(again.model, tmp_path / "stage2", merge=False)
    assert equal(outputs(again), outputs(policy)) and [path.name for path in tmp_path.iterdir()] == ["stage2"]
