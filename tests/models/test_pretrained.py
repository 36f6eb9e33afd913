"""Every key has its place, numbers are in bounds, and no code of a folder is run, whatever is answered at the terminal."""

import importlib.util
import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import CheckpointError
from models.llava.llava_med import load_llava
from models.loading import load_policy
from models.pretrained import check_numbers, four_bits
from models.prs_med.model import load_prs_med
from models.starter.llava import build_tiny_llava
from tests.models.llava.test_llava_med import original_parts, save_original
from tests.models.prs_med.test_model import build
from tests.tiny_qwen import save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: (folder, how it is loaded)}, one of each kind of checkpoint."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("qwen", "adapter", "llava", "llava_med", "prs_med"):
        (root / name).mkdir()
    save_tiny(root / "qwen")
    load_policy(str(root / "qwen"), lora={"r": 2, "alpha": 4, "dropout": 0.0}).model.save_pretrained(root / "adapter")
    for part in build_tiny_llava(["Where?"]):
        part.save_pretrained(root / "llava")
    save_original(root / "llava_med", *original_parts(root / "llava_med" / "clip"))
    build().save_pretrained(root / "prs_med")
    loads = {"qwen": load_policy, "adapter": load_policy, "llava": load_llava, "llava_med": load_llava, "prs_med": load_prs_med}
    return {name: (root / name, load) for name, load in loads.items()}


@pytest.fixture(params=["qwen", "adapter", "llava", "llava_med", "prs_med"])
def checkpoint(request, folders, tmp_path):
    """(a copy of its folder, how it is loaded)."""
    folder, load = folders[request.param]
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", load


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("unknown", [False, True])
def test_no_code_of_a_folder_runs_and_nothing_is_asked(checkpoint, unknown, tmp_path, monkeypatch):
    """Each JSON file names the folder's own Python for everything, and `y` is what the terminal would answer."""
    folder, load = checkpoint
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import *\nclass Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    kinds = "AutoConfig AutoModel AutoModelForImageTextToText AutoTokenizer AutoImageProcessor AutoProcessor".split()
    named = {"auto_map": dict.fromkeys(kinds, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    named |= {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "custom_generate": "evil"}
    named |= {"model_type": "evil", "tokenizer_class": "Evil"} if unknown else {}
    for file in folder.rglob("*.json"):
        if file.name not in ("vocab.json", "tokenizer.json", "prs_med.json") and "index" not in file.name:
            edit(file, **named)
        (file.parent / "evil.py").write_text(code)
        (file.parent / "custom_generate").mkdir(exist_ok=True)
        (file.parent / "custom_generate" / "generate.py").write_text(code)
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.syspath_prepend(str(folder))
    try:
        load(str(folder))
        assert not unknown or (folder / "adapter_config.json").exists()  # which has no model_type that is read
    except (CheckpointError, OSError) as error:
        assert unknown and "\n" not in str(error)
    assert not marker.exists() and answers.tell() == 0


def test_a_module_that_an_adapter_names_is_not_imported(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["adapter"][0], tmp_path / "adapter")
    (tmp_path / "evil_core.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(tmp_path / "adapter" / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil_core")
    with pytest.raises(CheckpointError, match="megatron_config is not supported"):
        load_policy(str(tmp_path / "adapter"))
    assert not (tmp_path / "ran").exists()


def weights_of(folder):
    names = ("model.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors")
    return next(file for name in names for file in sorted(folder.rglob(name)) if file.parent.name != "clip")


@pytest.mark.parametrize("damage", ["missing", "unexpected", "of another shape", "not finite", "cut", "empty", "lfs", "gone"])
def test_weights_that_are_not_whole_are_refused_by_name(checkpoint, damage):
    """Hugging Face's loaders give what is missing random values, and warn."""
    folder, load = checkpoint
    file = weights_of(folder)
    state = load_file(file)
    key = sorted(state)[0]
    if damage == "missing":
        del state[key]
    elif damage == "unexpected":
        state[key.rsplit(".", 1)[0] + ".more"] = torch.zeros(2)
    elif damage == "of another shape":
        state[key] = torch.zeros(3, 3, 3)
    elif damage == "not finite":
        state = {name: tensor * float("nan") if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if damage in ("cut", "empty", "lfs"):
        lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        file.write_bytes({"cut": file.read_bytes()[:-100], "empty": b"", "lfs": lfs}[damage])
    elif damage == "gone":
        file.unlink()
    else:
        save_file(state, file)
    with pytest.raises(CheckpointError) as error:
        load(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    if damage in ("cut", "empty", "lfs"):
        assert file.name in str(error.value)


def test_sizes_are_whole_numbers_in_bounds(tmp_path):
    check_numbers({"hidden_size": 64, "vision_config": {"depth": 2, "x": "y"}, "vocab_size": None}, tmp_path)
    for value in (0, -1, 1.5, "2", True, [], 10**9):
        with pytest.raises(CheckpointError, match="vision_config.depth is .* expected a whole number from 1 to 1024"):
            check_numbers({"vision_config": {"depth": value}}, tmp_path)


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "x", None, 3])
def test_weights_quantized_by_other_packages_are_refused(folders, tmp_path, method):
    shutil.copytree(folders["qwen"][0], tmp_path / "copy")
    edit(tmp_path / "copy" / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointError, match="config.json: weights quantized by .* not supported"):
        load_policy(str(tmp_path / "copy"))


def test_a_model_and_an_adapter_in_one_folder_are_ambiguous(folders, tmp_path):
    shutil.copytree(folders["qwen"][0], tmp_path / "both")
    shutil.copy(folders["adapter"][0] / "adapter_config.json", tmp_path / "both")
    with pytest.raises(CheckpointError, match="expected a model or an adapter"):
        load_policy(str(tmp_path / "both"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_their_package_are_refused(folders, tmp_path):
    with pytest.raises(CheckpointError, match="need bitsandbytes, which is not installed"):
        four_bits([])
    shutil.copytree(folders["qwen"][0], tmp_path / "copy")
    edit(tmp_path / "copy" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(CheckpointError, match="weights quantized by bitsandbytes need it"):
        load_policy(str(tmp_path / "copy"))


def test_adapters_train_on_four_bits(folders):
    pytest.importorskip("bitsandbytes")
    policy = load_policy(str(folders["qwen"][0]), lora={"r": 2, "alpha": 4, "dropout": 0.0}, load_in_4bit=True)
    layers = {name: type(module).__name__ for name, module in policy.base.named_modules()}
    assert layers["model.language_model.layers.0.self_attn.q_proj.base_layer"] == "Linear4bit"
    assert layers["model.visual.blocks.0.attn.qkv"] == layers["lm_head"] == "Linear"
    with pytest.raises(CheckpointError, match="can be neither trained nor merged"):
        load_policy(str(folders["qwen"][0]), merge_adapter=True, load_in_4bit=True)
    from tests.tiny_qwen import encode, ragged_prompts

    inputs = policy.answer_inputs(encode(policy, *ragged_prompts(2)), torch.randint(20, 300, (2, 2, 4)))
    policy.model(**inputs, head=lambda hidden, weight: hidden @ weight.T).logsumexp(-1).sum().backward()
    graded = [name for name, parameter in policy.model.named_parameters() if parameter.grad is not None]
    assert graded and all("lora_" in name for name in graded)
