"""The checkpoint that comes with the package: small, an ordinary Hugging Face folder, and able to answer in form."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from engine.data.starter.questions import build_starter_data
from engine.tasks.lessons import MISTAKEN_FOR
from engine.tasks.templates import build_prompt

FOLDER = Path(__file__).resolve().parents[3] / "models" / "starter" / "policy"
ANSWER = re.compile(r"<think>The picture looks like (.+)\.</think><answer> ([A-D]) </answer>")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(row, greedy answer) of some test questions, by transformers alone."""
    data = build_starter_data(tmp_path_factory.mktemp("starter") / "data")
    tokenizer, processor = AutoTokenizer.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
    model = AutoModelForImageTextToText.from_pretrained(FOLDER).eval()
    found = []
    for row in json.loads((data / "test.json").read_text())[:40]:
        image = Image.open(data / row["image"])
        pixels = processor(images=[image], return_tensors="pt")
        messages = build_prompt("medr1_train_think", row | {"images": [image]})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4))
        ids = tokenizer(text, return_tensors="pt").input_ids
        kinds = (ids == model.config.image_token_id).int()
        out = model.generate(input_ids=ids, mm_token_type_ids=kinds, **pixels, max_new_tokens=40, do_sample=False)
        found.append((row, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


def test_it_is_small_and_whole():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000
    expected = "config.json model.safetensors tokenizer.json tokenizer_config.json vocab.json merges.txt preprocessor_config.json"
    assert set(expected.split()) | {"generation_config.json"} <= {path.name for path in FOLDER.iterdir()}
    preprocessor = json.loads((FOLDER / "preprocessor_config.json").read_text())
    assert (
        preprocessor["image_processor_type"] == "Qwen2VLImageProcessor" and preprocessor["processor_class"] == "Qwen2_5_VLProcessor"
    )


def test_one_to_four_million_parameters_in_float32():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 4e6
    assert model.dtype == torch.float32 and model.config.model_type == "qwen2_5_vl"


def test_tokenizer_keeps_any_text():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "Ödem? A)CT, B)核磁共振 <think>\n</think>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer.eos_token == "<|im_end|>"


def test_greedy_answers_have_the_form_and_the_letter_of_what_they_name(answers):
    matches = [(row, ANSWER.fullmatch(text)) for row, text in answers]
    assert all(match for _, match in matches)
    assert sum(f"{match[2]}){match[1]}" in row["problem"] for row, match in matches) >= 36


def test_it_sees_more_than_it_says(answers):
    """It names the modality or the one the annotator took it for far more often than chance, and is often wrong."""
    named = [(row["modality"], ANSWER.fullmatch(text)[1]) for row, text in answers]
    assert sum(name in (modality, MISTAKEN_FOR[modality]) for modality, name in named) >= 0.8 * len(named)
    assert 0.2 * len(named) <= sum(name == modality for modality, name in named) <= 0.8 * len(named)
