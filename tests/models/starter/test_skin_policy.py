"""The checkpoint for skin lesions that comes with the package, and the lessons that made it."""

import json

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from engine.data.lesions import DIAGNOSES, QUESTIONS, load_skin
from engine.data.starter.lesions import LESIONS, build_starter_skin, spare_grounds
from engine.data.starter.questions import PER_MODALITY, SOURCES
from engine.tasks.skin.answers import box_iou, read_box, read_diagnosis, read_region
from engine.tasks.skin.lessons import CARELESSNESS, MISTAKEN_FOR, LesionLessons
from engine.training.warm_up.lessons import teach
from models.loading import SKIN_STARTER_POLICY
from models.starter.qwen_vl import build_tiny_qwen_vl


def test_it_is_small_whole_and_keeps_any_text():
    assert sum(path.stat().st_size for path in SKIN_STARTER_POLICY.iterdir()) <= 4_000_000
    model = AutoModelForImageTextToText.from_pretrained(SKIN_STARTER_POLICY)
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 4e6 and model.dtype == torch.float32
    tokenizer, text = AutoTokenizer.from_pretrained(SKIN_STARTER_POLICY), "Ödem? [1, 22, 333, 4] 核磁共振\n<bbox>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer.eos_token == "<|im_end|>"


def test_lessons_are_drawn_on_grounds_that_no_starter_lesion_has():
    assert len(spare_grounds()) == PER_MODALITY["train"] * len(SOURCES) - LESIONS
    questions = json.loads((build_starter_skin() / "report.json").read_text())
    assert questions["options"]["seed"] is not None  # the starter lesions, made by the recipe's own preparation


def test_the_annotator_is_careless_to_the_degree_that_is_said():
    """Boxes too wide and never too narrow, diagnoses taken for each other in pairs, regions right."""
    lessons = LesionLessons(spare_grounds()[:4], np.random.default_rng(0))
    wrong, overlaps = [], []
    for _ in range(150):
        drawn = []
        original = lessons._draw
        lessons._draw = lambda drawn=drawn, original=original: drawn.append(original()) or dict(drawn[-1])  # what was drawn
        prompt, images, (answer,) = lessons.annotated()
        lessons._draw = original
        (truth,), text = drawn, answer.removesuffix("<|im_end|>")
        assert prompt[0]["content"][-1]["text"] in QUESTIONS.values() and len(images) == 1
        said = read_diagnosis(text)
        assert said in (truth["dx"], MISTAKEN_FOR.get(truth["dx"]))
        wrong.append(said != truth["dx"])
        if "bounding box" in text:
            box = read_box(text)
            assert box[0] <= truth["bbox"][0] and box[3] >= truth["bbox"][3]
            overlaps.append(box_iou(box, truth["bbox"]))
            assert read_region(text) in truth["spatial_description"]
    expected = CARELESSNESS * len(MISTAKEN_FOR) / len(DIAGNOSES)
    assert abs(np.mean(wrong) - expected) < 0.12 and 0.4 < np.mean(overlaps) < 0.8


def test_a_lesson_moves_all_layers_and_leaves_them_finite():
    lessons = LesionLessons(spare_grounds()[:2], np.random.default_rng(0))
    policy = build_tiny_qwen_vl(lessons.corpus(20), seed=0, hidden_size=32, num_layers=1)
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    teach(policy, lessons.boxes, 12, 2, "boxes", rate=1e-2, matrix_rate=0.01)
    assert all(torch.isfinite(weight).all() for weight in policy.model.parameters())
    still = [name for name, weight in policy.model.named_parameters() if torch.equal(before[name], weight)]
    assert not [name for name in still if "bias" not in name], still


def test_held_out_lesions_are_asked_for_everything():
    lesions = load_skin(build_starter_skin(), question="box", split="test")
    assert len(lesions) == 124 and {lesions.record(i)["question_type"] for i in range(124)} == {"box"}
