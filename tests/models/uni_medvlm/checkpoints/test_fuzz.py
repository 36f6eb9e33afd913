"""Fuzz tests of a Uni-MedVLM checkpoint's settings: one line that says what is wrong, or a model that works."""

import pytest
from hypothesis import given

from models.uni_medvlm.checkpoints.loading import load_pretrained
from models.uni_medvlm.stages.artifacts import load_stage1
from models.uni_medvlm.stages.merged_experts import build_experts
from models.uni_medvlm.stages.trainable import prepare_stage
from tests.fuzz import bounded
from tests.models.test_fuzz import attempt, changes
from tests.models.uni_medvlm.small_unimed import LORA, outputs, small_unimed


@pytest.fixture(scope="module")
def whole(stages, tmp_path_factory):
    """A checkpoint after stage 5: with experts, and adapters on the attention."""
    policy = small_unimed()
    load_stage1(policy.model, stages["stage1"])
    build_experts(policy.model, stages["stage2"], stages["stage3"], lora=LORA)
    prepare_stage(policy.model, 5, LORA)
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    policy.model.save_pretrained(folder)
    return folder


@bounded(40)
@given(change=changes(["unimed.json", "tokenizer_config.json"]))
def test_a_checkpoint_with_changed_settings_is_refused_or_works(whole, change):
    """150 inputs: one takes 0.2 s."""
    policy = attempt(whole, change[0], lambda: load_pretrained(whole), *change[1:])
    assert policy is None or all(out.isfinite().all() for out in outputs(policy))
