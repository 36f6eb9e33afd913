"""`--use_liger_kernel`: refused where it would do nothing or take our loss's place; with Qwen-VL our forward stays."""

import pytest
from transformers.integrations.liger import apply_liger_kernel

from engine.errors import InputError
from engine.tasks.masks import MaskTask
from engine.training.config.masks import MaskConfig
from engine.training.config.sft import SFTConfig
from engine.training.masks import MaskTrainer
from engine.training.sft import SFTTrainer
from models.loading import load_policy
from tests.engine.training.grounding_run import DrawTask, build, rows
from tests.models.prs_med.test_model import build as build_prs_med
from tests.tiny_qwen import save_tiny


def asked_for(config, tmp_path):
    """As on a GPU: settings refuse it here."""
    args = config(output_dir=str(tmp_path), report_to="none")
    args.use_liger_kernel = True
    return args


def test_it_is_refused_where_no_layer_would_be_replaced(tmp_path):
    with pytest.raises(InputError, match="no effect on a PRSMed, which is none of transformers' models; leave it out"):
        MaskTrainer(build_prs_med(), MaskTask(), asked_for(MaskConfig, tmp_path), [])
    with pytest.raises(InputError, match="no effect on a UniMedVLM, which is none"):
        SFTTrainer(build("unimed"), DrawTask(), asked_for(SFTConfig, tmp_path), rows(2))


@pytest.mark.parametrize("name", ["cross_entropy", "fused_linear_cross_entropy"])
def test_its_losses_are_refused(name, tmp_path):
    with pytest.raises(InputError, match=f"--liger_kernel_config: {name} would take the place of this engine.s loss"):
        SFTConfig(output_dir=str(tmp_path), use_liger_kernel=True, liger_kernel_config={name: True})


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_with_qwen_norms_and_mlps_are_replaced_and_our_forward_stays(model_type, tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed here")
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    for module in (modeling_qwen2_vl, modeling_qwen2_5_vl):  # it changes these too, and is to leave them as they were
        for name in dir(module):
            monkeypatch.setattr(module, name, getattr(module, name))
    policy = load_policy(save_tiny(tmp_path, model_type))
    own = policy.model.forward
    apply_liger_kernel(policy.model, {"fused_linear_cross_entropy": False})
    assert policy.model.forward is own
    for base in (policy.base, policy.reference().base):
        layer = base.model.language_model.layers[0]
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            assert "liger_kernel" in part.forward.__module__ and part.forward.__self__ is part
