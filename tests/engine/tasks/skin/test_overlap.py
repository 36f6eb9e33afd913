"""The overlap of masks that a model finds for predicted boxes: the image embedded once a group, every odd box a number."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.lesions import load_skin
from engine.data.starter.lesions import build_starter_skin
from engine.tasks.skin.overlap import MaskReward, box_reward
from engine.tasks.skin.task import LesionTask
from models.checkpoint import CheckpointError
from models.sam.loading import load_predictor

SIZE = (60, 45)


def fill(image, boxes):
    """Each box is its own mask."""
    calls.append((image, list(boxes)))
    masks = np.zeros((len(boxes), image.height, image.width), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    return masks


calls: list = []


@pytest.fixture
def mask(tmp_path):
    """A lesion in columns 10 to 29 and rows 5 to 24."""
    calls.clear()
    drawn = Image.new("L", SIZE)
    drawn.paste(255, (10, 5, 30, 25))
    drawn.save(tmp_path / "lesion_segmentation.png")
    return str(tmp_path / "lesion_segmentation.png")


def reward(texts, mask, question="box"):
    columns = {"question_type": [question], "mask": [mask], "images": [[Image.new("RGB", SIZE)]]}
    return MaskReward(fill)(None, texts, **{key: value * len(texts) for key, value in columns.items()})


def test_every_answer_of_a_group_is_scored_in_one_call(mask):
    texts = ["[10, 5, 30, 25]", "[10, 5, 20, 25]", "no box", "[30, 5, 10, 25]", "[10, 5, 30, 25] twice"]
    assert reward(texts, mask) == [1, 0.5, 0, 0, 1]
    assert [boxes for _, boxes in calls] == [[(10, 5, 30, 25), (10, 5, 20, 25)]]


def test_a_box_ends_at_the_image_and_one_outside_earns_nothing(mask):
    assert reward(["[-10, -5, 999999, 999999]", "[100, 5, 120, 25]", "[-9, -9, -1, -1]"], mask) == [400 / 2700, 0, 0]
    assert calls[0][1] == [(0, 0, 60, 45)]


def test_none_where_no_box_is_asked_for_or_no_mask_known(mask):
    assert reward(["[10, 5, 30, 25]"], mask, "location") == [None] and reward(["[10, 5, 30, 25]"], None) == [None]
    assert not calls and reward(["melanoma"], mask) == [0] and not calls


def test_the_task_scores_and_rewards_by_masks(mask):
    task = LesionTask.of(fill)
    assert [each.__name__ for each in task.rewards] == ["diagnosis", "location", "mask", "format"]
    assert [each.__name__ for each in LesionTask.of(None).rewards] == ["diagnosis", "location", "box", "format"]


def test_a_real_sam_follows_the_lesion_and_not_the_box():
    """Boxes half as wide again as the lesion: LiteMedSAM's masks fit the lesions better than the boxes fit theirs."""
    try:
        predictor = load_predictor("lite_medsam", None, torch.device("cpu"))
    except CheckpointError as error:
        pytest.skip(str(error))
    lesions = load_skin(build_starter_skin(), question="box", boxes_only=True, split="test")
    found = []
    for i in (0, 1, 2, 3):
        row = lesions[i]
        x1, y1, x2, y2 = row["bbox"]
        dx, dy = (x2 - x1) / 4, (y2 - y1) / 4
        columns = {key: [row[key]] for key in ("question_type", "mask", "images", "bbox")}
        text = [f"[{x1 - dx:.0f}, {y1 - dy:.0f}, {x2 + dx:.0f}, {y2 + dy:.0f}]".replace("[-", "[0")]
        found.append((MaskReward(predictor.masks_of)(None, text, **columns)[0], box_reward(None, text, **columns)[0]))
    masks, boxes = np.mean(found, axis=0)
    assert masks > boxes + 0.15
