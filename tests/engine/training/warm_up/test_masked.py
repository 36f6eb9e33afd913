"""The warm-up of a small vision-language model: what its image tokens are to tell, what it is asked, and the same bits again."""

import random

import torch

from engine.training.warm_up.masked import garble, patch_loss, warm_up
from models.prs_med.processor import PRSMedProcessor
from models.starter.llava import build_tiny_llava
from tests.models.prs_med.test_model import ANSWERS, QUESTIONS, rows


def test_image_tokens_that_tell_lesion_row_and_column_have_no_loss():
    masks = torch.zeros(1, 1, 8, 8)
    masks[..., :4, 4:] = 1  # the second of 2 x 2 image tokens
    right = torch.tensor([[-50.0, -1, -1], [50, -1, 1], [-50, 1, -1], [-50, 1, 1]])
    assert patch_loss(right, masks) < 1e-6
    mirrored = right[[1, 0, 3, 2]]
    assert patch_loss(mirrored, masks) > 1


def test_a_garbled_question_keeps_some_words_and_the_row_all_else():
    row = {"question": "where is the lesion in this picture", "answer": "in the center", "row": 7}
    order = random.Random(0)
    garbled = [garble(row, order) for _ in range(50)]
    assert all(other | {"question": ""} == row | {"question": ""} for other in garbled)
    kept = [len(set(other["question"].split()) & set(row["question"].split())) for other in garbled]
    assert 7 / 3 - 0.7 < sum(kept) / len(kept) < 7 / 3 + 0.7


def warmed(seed: int):
    vlm, tokenizer = build_tiny_llava([*QUESTIONS, *ANSWERS])
    before = {name: weight.clone() for name, weight in vlm.state_dict().items()}
    warm_up(vlm, PRSMedProcessor(tokenizer, vlm.config, 128).collate, rows(), steps=2, learning_rate=1e-3, seed=seed)
    return before, vlm.state_dict()


def test_a_seed_decides_every_weight_and_every_weight_that_is_used_learns():
    (before, after), (_, again), (_, other) = warmed(3), warmed(3), warmed(4)
    assert all(torch.equal(after[name], again[name]) for name in before)
    still = {name for name in before if torch.equal(before[name], after[name])}
    unused = ("layers.2.", "post_layernorm", "position_ids")  # the features are those of the vision tower's second layer
    assert all("vision_tower" in name and any(part in name for part in unused) for name in still), still
    assert not torch.equal(after["lm_head.weight"], other["lm_head.weight"])
