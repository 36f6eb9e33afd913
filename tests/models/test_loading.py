"""An adapter is taken wherever a model is: evaluated, trained further, merged; its base is found, or asked for in one line."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from models.checkpoint import CheckpointError
from models.loading import find_base, load_policy, write_merged
from models.qwen.policy import QwenVLPolicy
from tests.tiny_qwen import encode, ragged_prompts, save_tiny

LORA = {"r": 2, "alpha": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "base")


def adapt(base, folder, **settings):
    """An adapter made by PEFT alone, with an effect; as a published one it has no tokenizer and is named by its hub."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return adapt(base, tmp_path_factory.mktemp("adapters") / "one")


@torch.no_grad()
def logits(policy):
    return policy.prefill(encode(policy, *ragged_prompts(2)), 1, 1)[1]


@torch.no_grad()
def scored(policy):
    """Logits of the shared-prefix forward, which losses are computed from."""
    ids = torch.randint(20, 300, (2, 2, 5), generator=torch.Generator().manual_seed(0))
    return policy.model(**policy.answer_inputs(encode(policy, *ragged_prompts(2)), ids), head=lambda h, w: h @ w.T)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": r".*visual.*\.qkv"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"layers.1.*q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"target_modules": "all-linear"},
    ],
)
def test_an_adapter_computes_what_peft_does_and_so_does_what_it_is_merged_into(base, tmp_path, settings):
    folder = str(adapt(base, tmp_path / "adapter", **settings))
    policy, merged = load_policy(folder), load_policy(folder, merge_adapter=True)
    theirs = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder).eval()
    assert torch.equal(logits(policy), logits(QwenVLPolicy(theirs, policy.processor)))
    assert not torch.allclose(logits(policy), logits(load_policy(base)), atol=1e-3)
    assert torch.allclose(logits(merged), logits(policy), atol=1e-4) and torch.allclose(scored(merged), scored(policy), atol=1e-4)
    assert not isinstance(merged.model, PeftModel) and all(parameter.requires_grad for parameter in merged.model.parameters())


def test_an_adapter_is_trained_further_with_its_own_settings(base, adapter):
    policy = load_policy(str(adapter), lora=LORA)
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name and name.split(".")[-4] in ("q_proj", "v_proj") for name in trained)
    assert policy.model.peft_config["default"].r == 4 and torch.equal(logits(policy), logits(load_policy(str(adapter))))


def test_a_frozen_tower_keeps_its_adapters_as_they_are(base, tmp_path):
    folder = str(adapt(base, tmp_path / "adapter", target_modules=["q_proj", "qkv"]))
    policy = load_policy(folder, lora=LORA, freeze_vision=True)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert trained and not any(".visual." in name for name in trained)
    reference = policy.reference()
    with torch.no_grad(), reference.as_reference():
        assert torch.equal(scored(reference), scored(policy))


def test_the_reference_is_what_training_began_with(base, adapter):
    policy = load_policy(str(adapter), lora=LORA)
    reference, before, bare = policy.reference(), scored(policy), scored(load_policy(base))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        after = scored(policy)
        for _ in range(2):
            with reference.as_reference(), torch.autocast("cpu", enabled=False):
                assert torch.equal(scored(reference), before)
            assert torch.equal(scored(policy), after)
    assert not torch.allclose(before, bare, atol=1e-3) and not torch.allclose(after, before, atol=1e-3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = scored(policy)
        with reference.as_reference():
            assert not torch.equal(scored(reference), trained)
        assert torch.equal(scored(policy), trained)


def test_checkpoints_record_their_base(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "here")
    load_policy("here", lora=LORA).model.save_pretrained(tmp_path / "adapter")
    assert find_base(tmp_path / "adapter") == (str(tmp_path / "here"), "main")
    load_policy(str(tmp_path / "adapter"), lora=LORA).model.save_pretrained(tmp_path / "further")
    monkeypatch.chdir("/")
    assert find_base(tmp_path / "further")[0] == str(tmp_path / "here")


def test_a_base_is_found_where_it_is_named_or_beside_or_is_asked_for(base, adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())

    def naming(name):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))

    for gone in ("/gone/base", "C:\\models\\base", "../base", "org/base"):
        naming(gone)
        with pytest.raises(CheckpointError, match="name it with --base_model_name_or_path"):
            load_policy(str(folder))
    shutil.copytree(base, tmp_path / "base")
    for name in ("/gone/base", "C:\\models\\base", "../base", "org/base", "/gone/base/"):
        naming(name)
        assert find_base(folder)[0] == str(tmp_path / "base")
    for nothing in (None, "", "  ", 3, [], "..", "/", "x" * 5000, "a\0b"):
        naming(nothing)
        with pytest.raises(CheckpointError, match="base") as error:
            load_policy(str(folder))
        assert "\n" not in str(error.value)
        assert torch.equal(logits(load_policy(str(folder), base_model=base)), logits(load_policy(str(adapter))))
    naming(str(adapter))
    with pytest.raises(CheckpointError, match="itself an adapter: merge it first"):
        load_policy(str(folder))
    with pytest.raises(CheckpointError, match="only an adapter has a base"):
        load_policy(base, base_model=base)


def test_keys_of_older_transformers_are_the_same_adapter(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "old")
    file = tmp_path / "old" / "adapter_model.safetensors"
    save_file({key.replace("model.model.language_model.", "model.model."): x for key, x in load_file(file).items()}, file)
    assert torch.equal(logits(load_policy(str(tmp_path / "old"))), logits(load_policy(str(adapter))))


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING': expected LORA"),
        ({"peft_type": None}, "expected LORA"),
        ({"r": 10**9}, "a rank .* expected 1 to 4096"),
        ({"r": "8"}, "a rank"),
        ({"lora_alpha": None}, "lora_alpha is 'None'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern and alpha_pattern"),
        ({"r": 8}, "not adapters of this model: .* of another shape"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused_by_name(adapter, tmp_path, setting, message):
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(CheckpointError, match=message):
        load_policy(str(tmp_path / "adapter"))


def test_a_pattern_that_matches_for_ever_is_not_matched(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": r"([\w.]+)+#", "exclude_modules": r"([\w.]+)+#"}))
    assert torch.equal(logits(load_policy(str(tmp_path / "adapter"))), logits(load_policy(str(adapter))))


def test_adapters_of_the_head_are_refused(base, tmp_path):
    folder = adapt(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(CheckpointError, match="adapts lm_head, which has the head's weights"):
        load_policy(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_folder_is_whole_and_of_its_bases_type(base, tmp_path, dtype):
    AutoModelForImageTextToText.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"):
        shutil.copy(f"{base}/{file}", tmp_path / "base")
    folder = adapt(tmp_path / "base", tmp_path / "adapter")
    said = write_merged(str(folder), tmp_path / "out" / "merged")
    assert said["base"] == str(tmp_path / "base") and said["dtype"] == str(dtype).removeprefix("torch.")
    merged = tmp_path / "out" / "merged"
    assert [path.name for path in merged.parent.iterdir()] == ["merged"] and not list(merged.glob("adapter*"))
    assert {x.dtype for x in load_file(merged / "model.safetensors").values()} == {dtype}
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert torch.allclose(logits(load_policy(str(merged))), logits(load_policy(str(folder))), atol=tolerance)
    alone = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32).eval()
    assert torch.equal(logits(QwenVLPolicy(alone, load_policy(str(merged)).processor)), logits(load_policy(str(merged))))
    with pytest.raises(OSError, match="merged: exists already"):
        write_merged(str(folder), merged)


def test_a_merge_that_fails_leaves_nothing(base, adapter, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="a whole model, not an adapter"):
        write_merged(base, tmp_path / "out")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        write_merged(str(adapter), tmp_path / "out")
    assert not list(tmp_path.iterdir())
