"""What a Qwen-VL is exported as: the parts, uncompiled, answer as transformers' `generate`; layout and chat are the originals'."""

import json

import pytest
import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from models.checkpoint import CheckpointError
from models.exported import Source
from models.loading import STARTER_POLICY
from models.qwen.export.chat import chat_segments, join
from models.qwen.export.exporting import export_qwen
from models.qwen.export.image_layout import patch_positions, patch_windows
from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import save_tiny

QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def eager(part):
    """An exported part's way to be run, without its having been compiled."""

    def run(inputs):
        with torch.no_grad():
            return (part.module(*(inputs[name] for name in part.inputs)),)

    return run


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def exported(request, tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp(request.param), request.param)
    return export_qwen(load_qwen_vl(folder), Source("tiny", "0" * 64, "none"))


def test_the_parts_answer_as_generate_does(exported):
    found = exported.check({part.name: eager(part) for part in exported.parts})
    assert found["greedy_tokens_equal"] and found["greedy_prompts"] == 3 and found["logits_error"] < 1e-4


@pytest.mark.parametrize("broken", ["vision", "prefill", "decode"])
def test_a_part_that_computes_otherwise_is_found(exported, broken):
    runs = {part.name: eager(part) for part in exported.parts}
    right = runs[broken]
    runs[broken] = lambda inputs: (right(inputs)[0] * 1.01,)
    with pytest.raises(ValueError, match="logits differ from generate's"):
        exported.check(runs)


def test_inputs_are_drawn_for_any_sizes_and_fit_the_parts(exported):
    ranges = exported.dimensions
    for ends in (0, 1):
        sizes = {name: limits[ends] for name, limits in ranges.items()}
        for part in exported.parts:
            given = part.sample(sizes, torch.Generator().manual_seed(0))
            for name, shape in part.inputs.items():
                assert given[name].shape == tuple(sizes.get(entry, entry) for entry in shape)
            assert eager(part)(given)[0].isfinite().all()


def test_a_bundle_is_told_its_preprocessing_and_its_tokenizer(exported):
    facts = exported.facts["preprocessing"]
    windows = exported.facts["model"]["family"] == "qwen2_5_vl"
    assert facts["window_size"] == (56 // 14 if windows else 0) and facts["filter"] == "bicubic"
    assert (facts["min_pixels"], facts["max_pixels"]) == (28 * 28, 112 * 112)
    assert json.loads(exported.files["tokenizer.json"])["model"]["type"] == "BPE"
    assert ("windows" in exported.dimensions) == windows


@pytest.mark.parametrize("rows, columns", [(2, 2), (4, 6), (8, 8), (10, 14), (2, 22)])
def test_patches_stand_and_share_windows_as_in_transformers(rows, columns):
    grid = torch.tensor([[1, rows, columns]])
    positions = patch_positions(rows, columns, 2)
    assert torch.equal(positions.flatten(0, 1), get_vision_position_ids(grid, 2))
    windows, slots = patch_windows(positions, columns, 4)
    order, ends = get_vision_window_index(grid, 2, 56, 14)
    patches = torch.arange(rows * columns).view(-1, 4)[order].flatten()
    expected = [set(patches[a:b].tolist()) for a, b in zip(ends, ends[1:], strict=False)]
    assert [set(row[row >= 0].tolist()) for row in windows] == expected
    assert torch.equal(windows.flatten()[slots.flatten()], torch.arange(rows * columns))


def test_a_default_system_message_is_the_opening():
    processor = load_qwen_vl(STARTER_POLICY).processor
    processor.tokenizer.chat_template = QWEN2_TEMPLATE
    segments = chat_segments(processor)
    assert segments["opening"] == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    expected = processor.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert join(segments, conversation) == expected


@pytest.mark.parametrize(
    "change",
    [
        ("<|im_start|>{{ message['role'] }}", "{{ loop.index }}{{ message['role'] }}"),  # what stands there depends on the place
        ("<|vision_start|><|image_pad|>", ""),  # no place for an image
        ("{{ content['text'] }}", "{{ content['text'] | trim }}"),  # the text itself is changed
        ("{% for message in messages %}", "{% for message in messages %}{{ raise_exception('never') }}"),
    ],
)
def test_a_template_of_another_form_is_refused(change):
    processor = load_qwen_vl(STARTER_POLICY).processor
    assert change[0] in QWEN2_TEMPLATE
    processor.tokenizer.chat_template = QWEN2_TEMPLATE.replace(*change)
    with pytest.raises(CheckpointError, match="the chat template cannot be rendered to segments"):
        chat_segments(processor)
