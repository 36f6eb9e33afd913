"""Fuzz tests of what a checkpoint's JSON files may hold: one line that says what is wrong, or a model that works."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.checkpoint import CheckpointError, indexed_files, read_json
from models.llava.llava_med import load_llava
from models.loading import load_policy
from models.lora import read_adapter_config
from models.pretrained import read_config
from models.prs_med.model import load_prs_med, read_settings
from models.qwen.policy import QwenVLPolicy
from tests.fuzz import bounded
from tests.models.llava.test_llava_med import original_parts, save_original
from tests.models.prs_med.test_model import QUESTIONS, build, image
from tests.tiny_qwen import encode, ragged_prompts, save_tiny

NUMBERS = [-1, 0, 1, 2, 3, 7, 1 << 20, 1 << 40, 10**30, -0.5, 0.5, 1e-30, 1e30]
WORDS = ["", "x", "0", "LORA", "silu", "../../../etc/passwd", "/etc/passwd", "\0", "a\nb", "evil.Evil", "qwen2_vl", "llava", "clip"]
JUNK = st.one_of(
    st.sampled_from([None, True, False, [], {}, [1], [[]], {"a": 1}, [0.5, 0.5, 0.5], *NUMBERS, *WORDS]),
    st.integers(-300, 600),
    st.text(max_size=4),
    st.lists(st.integers(-2, 400), max_size=3),
)
NAMES = ["auto_map", "model_type", "quantization_config", "attn_implementation", "tie_word_embeddings", "dtype", "x", "vocab_file"]
NAMES += ["megatron_config", "modules_to_save", "rank_pattern", "transformers_weights", "configuration_files", "rope_scaling"]


@st.composite
def changes(draw, files):
    """(file, what to do to its content)."""
    file = draw(st.sampled_from(files))
    places, doing, value = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4)), draw(st.integers(0, 5)), draw(JUNK)
    return file, places, doing, value, draw(st.sampled_from(NAMES)), draw(st.integers(0, 400))


def changed(text: str, places: list[int], doing: int, value, name: str, cut: int) -> str:
    """The text of a JSON file with a value replaced or left out at some depth, a setting added, or the text cut."""
    if doing == 5:
        return text[: cut % len(text)]
    whole = json.loads(text)
    part = whole
    for place in places:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            break
        key = keys[place % len(keys)]
        if isinstance(part[key], (dict, list)) and part[key] and place != places[-1]:
            part = part[key]
            continue
        if doing == 0:
            del part[key]
        elif doing == 1 and isinstance(part, dict):
            part[name] = value
        else:
            part[key] = value
        break
    return json.dumps(whole)


def attempt(folder, file, load, *how):
    """What `load()` gives with the file changed, None where it is refused in one line; the file is as it was afterwards."""
    before = (folder / file).read_text(encoding="utf-8")
    try:
        (folder / file).write_text(changed(before, *how), encoding="utf-8")
        try:
            return load()
        except (CheckpointError, OSError) as error:
            assert "\n" not in str(error) and str(error), error
            return None
    finally:
        (folder / file).write_text(before, encoding="utf-8")


def works(policy: QwenVLPolicy) -> bool:
    """It answers two prompts with finite logits."""
    decoding, logits = policy.prefill(encode(policy, *ragged_prompts(2)), 1, 2)
    again = decoding.step(logits.argmax(-1))
    return bool(logits.isfinite().all() and again.isfinite().all()) and bool(policy.processor.text_ids("Where?"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder of a policy, folder of an adapter of it)."""
    folder, adapter = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("adapter")
    save_tiny(folder)
    policy = load_policy(str(folder), lora={"r": 2, "alpha": 4, "dropout": 0.0})
    policy.model.save_pretrained(adapter)
    return folder, adapter


QWEN = ["config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"]


@bounded(60)
@given(change=changes(QWEN))
@torch.no_grad()
def test_a_policy_with_changed_settings_is_refused_or_works(tiny, change):
    """250 inputs: one takes 0.1 s."""
    policy = attempt(tiny[0], change[0], lambda: load_policy(str(tiny[0])), *change[1:])
    assert policy is None or works(policy)


@bounded(40)
@given(change=changes(["adapter_config.json"]))
@torch.no_grad()
def test_an_adapter_with_changed_settings_is_refused_or_works(tiny, change):
    """150 inputs: one takes 0.1 s."""
    policy = attempt(tiny[1], change[0], lambda: load_policy(str(tiny[1])), *change[1:])
    assert policy is None or works(policy)


@pytest.fixture(scope="module")
def llava_med(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_med")
    return save_original(folder, *original_parts(folder / "clip"))


@bounded(50)
@given(change=changes(["config.json", "model.safetensors.index.json", "tokenizer_config.json", "clip/config.json"]))
@torch.no_grad()
def test_a_llava_med_with_changed_settings_is_refused_or_works(llava_med, change):
    """200 inputs: one takes 0.1 s."""
    loaded = attempt(llava_med, change[0], lambda: load_llava(str(llava_med)), *change[1:])
    if loaded is not None:
        model, tokenizer = loaded
        ids = torch.tensor([[tokenizer.bos_token_id] + [model.config.image_token_id] * model.config.image_seq_length + [5, 6]])
        side = model.config.vision_config.image_size
        assert model(input_ids=ids, pixel_values=torch.rand(1, 3, side, side)).logits.isfinite().all()


@pytest.fixture(scope="module")
def prs_med(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prs_med")
    build().save_pretrained(folder)
    return folder


PRS_MED = ["prs_med.json", "lora_adapter/adapter_config.json", "tokenizer/tokenizer_config.json", "vlm/config.json"]


@bounded(40)
@given(change=changes([*PRS_MED, "vlm/generation_config.json", "vlm/tokenizer_config.json"]))
def test_a_prs_med_with_changed_settings_is_refused_or_works(prs_med, change):
    """150 inputs: one takes 0.15 s."""
    model = attempt(prs_med, change[0], lambda: load_prs_med(prs_med), *change[1:])
    if model is not None:
        _, logits = model.segment(image(0), QUESTIONS[0], max_new_tokens=2)
        assert logits.shape == (90, 120) and logits.isfinite().all()


READERS = {
    "config.json": lambda folder: read_config(folder),
    "adapter_config.json": lambda folder: read_adapter_config(folder),
    "model.safetensors.index.json": lambda folder: indexed_files(folder / "model.safetensors.index.json"),
    "prs_med.json": lambda folder: read_settings(folder / "prs_med.json"),
}


@pytest.fixture(scope="module")
def described(tiny, llava_med, prs_med, tmp_path_factory):
    """A folder for each of READERS with that file alone, and the shards that an index names."""
    sources = [tiny[0], tiny[1], llava_med, prs_med]
    folders = {}
    for name, source in zip(READERS, sources, strict=True):
        folders[name] = tmp_path_factory.mktemp("described")
        shutil.copy(source / name, folders[name])
        for shard in source.glob("model-*.safetensors"):
            shutil.copy(shard, folders[name])
    return folders


@bounded()
@given(change=changes(list(READERS)))
def test_what_a_checkpoint_says_is_read_or_refused_in_one_line(described, change):
    name = change[0]
    found = attempt(described[name], name, lambda: READERS[name](described[name]), *change[1:])
    if name == "model.safetensors.index.json" and found:
        assert all(file.parent == described[name] for file in found)


@bounded()
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes_are_an_object_or_refused_in_one_line(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    try:
        assert isinstance(read_json(file), dict)
    except CheckpointError as error:
        assert "\n" not in str(error) and "any.json" in str(error)
