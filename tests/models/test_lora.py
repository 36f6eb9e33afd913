"""LoRA: which layers get adapters, of what type, and that they start without effect; the same for both families."""

import pytest
import torch

from models.loading import load_policy
from models.lora import ATTENTION, LINEARS, add_lora, beneath_adapters, in_language_model, layers_to_adapt
from models.starter.llava import build_tiny_llava
from tests.tiny_qwen import encode, ragged_prompts, save_tiny


@pytest.fixture(params=["qwen", "llava"])
def model(request, tmp_path):
    """Two layers of language and some of vision."""
    if request.param == "llava":
        return build_tiny_llava(["Where?"], num_layers=2)[0].to(torch.bfloat16)
    return load_policy(save_tiny(tmp_path), dtype=torch.bfloat16).base


def layers_with_adapters(model) -> set[str]:
    """Their names, each trained parameter being an adapter's."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in trained)
    return {name.split(".lora_")[0] for name in trained}


def test_adapters_are_in_float32_on_every_linear_layer_of_the_language_model(model):
    adapted = add_lora(model, r=2, alpha=4, dropout=0.0)
    layers = layers_with_adapters(adapted)
    assert len(layers) == 2 * len(LINEARS) and all(".language_model." in name for name in layers)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert beneath_adapters(adapted) is model and beneath_adapters(model) is model


def test_layers_and_type_can_be_chosen(model):
    adapted = add_lora(model, r=2, alpha=4, dropout=0.0, target_modules=in_language_model(ATTENTION), float32=False)
    assert {name.rsplit(".", 1)[-1] for name in layers_with_adapters(adapted)} == set(ATTENTION)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}


def test_new_adapters_change_nothing_until_they_learn(tmp_path):
    folder = save_tiny(tmp_path)
    plain, adapted = load_policy(folder), load_policy(folder, lora={"r": 2, "alpha": 4, "dropout": 0.0})
    logits = [policy.prefill(encode(policy, *ragged_prompts(2)), 1, 1)[1] for policy in (plain, adapted)]
    assert torch.equal(*logits) and adapted.model is not adapted.base


def test_all_linear_is_every_linear_layer_but_the_head(model):
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert set(layers_to_adapt(model, ["all-linear"])) == linear
    assert set(layers_to_adapt(model, ["q_proj", "all-linear"])) == linear
    tower = next(name for name, _ in model.named_modules() if name in ("model.visual", "model.vision_tower"))
    kept = set(layers_to_adapt(model, ["all-linear"], tower))
    assert kept == {name for name in linear if not name.startswith(f"{tower}.")} and kept != linear
    adapted = add_lora(model, r=2, alpha=4, dropout=0.0, target_modules=["all-linear"], frozen=tower)
    assert {name.removeprefix("base_model.model.") for name in layers_with_adapters(adapted)} == kept


def test_layers_are_named_by_their_ends_or_by_a_lone_pattern(model):
    q = {name for name, _ in model.named_modules() if name.endswith(".q_proj")}
    assert set(layers_to_adapt(model, ["q_proj"])) == q
    first = layers_to_adapt(model, [r".*language_model\.layers\.0\..*q_proj"])
    assert first == ["model.language_model.layers.0.self_attn.q_proj"]
    assert layers_to_adapt(model, ["language_model.layers.0.self_attn.q_proj"]) == first
    with pytest.raises(ValueError, match="nope: no layer is called so; there are all-linear, .*q_proj"):
        layers_to_adapt(model, ["q_proj", "nope"])
    with pytest.raises(ValueError, match=r"not a pattern"):
        layers_to_adapt(model, ["(q_proj"])


def test_the_head_and_embeddings_tied_to_it_have_no_adapters(model):
    """Losses read the head's weights alone: an adapter there would be sampled from and never trained."""
    tied = ["lm_head", "embed_tokens"] if model.lm_head.weight is model.get_input_embeddings().weight else ["lm_head"]
    for name in tied:
        with pytest.raises(ValueError, match=f"{name} is the head, or shares its weights"):
            layers_to_adapt(model, ["q_proj", name])
