"""A whole checkpoint gives back the same logits and masks after any stage, whatever it lies beside; a wrong one is named."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import CheckpointError
from models.uni_medvlm.checkpoints.loading import load_pretrained
from models.uni_medvlm.experts import RoutingOptions
from models.uni_medvlm.stages.artifacts import load_stage1
from models.uni_medvlm.stages.merged_experts import build_experts
from models.uni_medvlm.stages.trainable import prepare_stage, trainable_names
from tests.models.uni_medvlm.small_unimed import LORA, QUESTIONS, changed, equal, outputs, small_unimed, train


def prepared(stage, stages, seed=0):
    policy = small_unimed(seed)
    if stage > 1:
        load_stage1(policy.model, stages["stage1"])
    if stage >= 4:
        build_experts(policy.model, stages["stage2"], stages["stage3"], RoutingOptions(1, renormalize=False), lora=LORA)
        policy.model.settings = replace(policy.model.settings, balance=0.02, z=0.001)
    if stage:
        prepare_stage(policy.model, stage, LORA)
    return policy


@pytest.mark.parametrize("stage", [0, 1, 2, 3, 4, 5])
def test_a_checkpoint_gives_the_same_logits_masks_and_tokens(stages, stage, tmp_path):
    policy = prepared(stage, stages)
    if stage:
        train(policy)
    policy.model.save_pretrained(tmp_path / "whole")
    again = load_pretrained(tmp_path / "whole")
    assert equal(outputs(again), outputs(policy)) and not trainable_names(again.model) and not again.model.training
    assert again.model.settings == policy.model.settings and again.model.origin == policy.model.origin
    assert again.seg_token_id == policy.seg_token_id and again.eos_token_ids == policy.eos_token_ids
    assert again.processor.text_ids(QUESTIONS[0] + "<SEG>") == policy.processor.text_ids(QUESTIONS[0] + "<SEG>")
    if stage >= 4:
        assert again.model.llm.get_decoder().layers[1].mlp.options == RoutingOptions(1, renormalize=False)
        assert torch.equal(again.auxiliary_loss(), policy.auxiliary_loss())


@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
def test_what_training_changes_is_read_back_bit_for_bit(stages, stage, tmp_path):
    policy = prepared(stage, stages)
    train(policy)
    policy.model.save_pretrained(tmp_path / "checkpoint-2")
    learnt = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    again = prepared(stage, stages)
    assert changed(again, learnt)
    again.model.load_trained(tmp_path / "checkpoint-2")
    assert not changed(again, learnt) and trainable_names(again.model) == trainable_names(policy.model)
    train(policy), train(again)
    assert not changed(again, policy.model.state_dict())


def test_stage_5_goes_on_from_stage_4s_checkpoint(stages, tmp_path):
    policy = prepared(4, stages)
    train(policy)
    policy.model.save_pretrained(tmp_path / "stage4")
    again = load_pretrained(tmp_path / "stage4")
    prepare_stage(again.model, 5, LORA)
    assert equal(outputs(again), outputs(policy))
    reference, before = again.reference(), outputs(again)
    train(again)
    assert not torch.allclose(outputs(again)[0], before[0], atol=1e-3)
    with reference.as_reference():
        assert equal(outputs(reference), before)


def test_a_language_model_in_bfloat16_stays_so(tmp_path):
    policy = small_unimed()
    policy.model.language_model.bfloat16()
    policy.model.save_pretrained(tmp_path / "half")
    again = load_pretrained(tmp_path / "half")
    assert again.model.llm.dtype == torch.bfloat16 and equal(outputs(again), outputs(policy))
    assert load_pretrained(tmp_path / "half", dtype=torch.float32).model.llm.dtype == torch.float32


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    policy = small_unimed()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        policy.model.save_pretrained(tmp_path / "whole")
    assert not list(tmp_path.iterdir())


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "whole"
    small_unimed().model.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copied")


def test_no_checkpoint_is_one_line_that_names_the_command(tmp_path):
    with pytest.raises(OSError, match="expected unimed.json; make one with: python -m recipes.unimed_stage4_router"):
        load_pretrained(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="not a whole Uni-MedVLM checkpoint: unimed.json is missing"):
        small_unimed().model.load_trained(tmp_path / "gone")


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("origin", 3, "origin: expected an object"),
        ("origin.sam", "sam_9000", "and a sam of"),
        ("origin.llm", 5, "expected folders, files or null"),
        ("origin.unknown", 5, "origin: expected an object of llm"),
        ("config.projector", "deep", "projector 'deep'"),
        ("dtype", "int8", "dtype is 'int8': expected float32"),
        ("start", "many", "cannot be used"),
        ("start", 10**6, "do not belong together"),
        ("start", 311, "the tokenizer has a token <SEG> of its own"),
        ("fused_after", [9, 9], "fused_after must name"),
        ("networks.llm", None, "networks lacks llm"),
        ("networks.llm.model_type", "clip", "no causal language model"),
        ("networks.llm.hidden_size", 10**9, "networks.llm.hidden_size is '1000000000': expected a whole number"),
        ("networks.vision_tower.hidden_size", 65, "cannot be used"),
        ("experts", {"num_experts": 2}, "cannot be used"),
        ("experts", {"num_experts": 10**9}, "num_experts is '1000000000': expected 1 to 256"),
        ("experts", {"num_experts": 2, "lora": {"r": 10**9}}, "experts: r is '1000000000'"),
        ("experts", 3, "experts: expected an object or null"),
        ("attention", {"r": -1}, "attention: r is '-1': expected 1 to 4096"),
        ("attention", {"r": 1, "rank": 2}, "cannot be used"),
        ("adapters", True, "adapter_config.json: no such file"),
        ("extra", 1, "unknown setting 'extra'"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(copied, where, value, said):
    settings = json.loads((copied / "unimed.json").read_text())
    names, place = where.split("."), settings
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    (copied / "unimed.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=said) as error:
        load_pretrained(copied)
    assert str(copied) in str(error.value) and "\n" not in str(error.value)


def test_each_setting_is_needed(copied):
    settings = json.loads((copied / "unimed.json").read_text())
    for name in settings:
        (copied / "unimed.json").write_text(json.dumps({key: value for key, value in settings.items() if key != name}))
        with pytest.raises(CheckpointError, match=f"unimed.json: lacks {name}"):
            load_pretrained(copied)
    (copied / "unimed.json").write_text("{")
    with pytest.raises(CheckpointError, match="unimed.json: not JSON"):
        load_pretrained(copied)


def test_weights_that_do_not_fit_are_refused_by_name(copied):
    file = copied / "model.safetensors"
    whole = load_file(file)
    for state, said in (
        ({key: x for key, x in whole.items() if key != "mm_projector.bias"}, "mm_projector.bias missing"),
        (whole | {"more": torch.zeros(1)}, "more unexpected"),
        (whole | {"mm_projector.bias": torch.zeros(3)}, r"mm_projector.bias is \[3\] instead of \[64\]"),
        (whole | {"mm_projector.bias": torch.full((64,), torch.inf)}, "mm_projector.bias is not finite"),
    ):
        save_file(state, file)
        with pytest.raises(CheckpointError, match=said):
            load_pretrained(copied)
    os.truncate(file, 1000)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_pretrained(copied)
    file.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: no such file"):
        load_pretrained(copied)


def test_a_missing_tokenizer_is_named(copied):
    (copied / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_pretrained(copied)
