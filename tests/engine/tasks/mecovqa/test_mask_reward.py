"""The IoU of drawn masks as a reward: what the masks of a plain answer score, and nothing where a row has none."""

import math

import numpy as np
import pytest
import torch

from engine.rollout.grounded import draw_masks
from engine.tasks.mecovqa.mask_reward import mask_reward
from engine.tasks.mecovqa.masks import score_masks
from engine.tasks.rewards import RewardFunctions
from tests.engine.training.grounding_run import DrawTask, build, rows
from tests.engine.training.grpo_run import make_trainer

TASK = DrawTask()


@pytest.mark.parametrize("kind", ["llava", "unimed"])
def test_rewards_are_the_iou_of_what_an_answer_draws(kind):
    """Two answers to each of four rows, of which two have masks: none said, one too few, as many as there are, one too many."""
    policy, data = build(kind), rows(4)
    seg, plain = policy.seg_token_id, policy.processor.text_ids("here")
    said = [[seg], [*plain, seg, seg], [seg], plain, [seg, *plain, seg], [*plain, seg], plain, [seg]]
    given = [row | {"prompt": TASK.prompt(row)} for row in data]
    asked = [given[i // 2] for i in range(8)]
    found = RewardFunctions([mask_reward(policy)])(asked, ["" for _ in said], said, step=1, state=None)[:, 0].tolist()
    for row, ids, reward in zip(asked, said, found, strict=True):
        if not row["masks"]:
            assert math.isnan(reward)
            continue
        batch = policy.batch([policy.processor.encode(row["prompt"], row["images"], row["image_id"])])
        (drawn,) = draw_masks(policy, batch, torch.tensor([[ids]]), torch.ones(1, len(ids)))
        truths = [np.asarray(mask) > 0 for mask in row["masks"]]
        assert reward == pytest.approx(score_masks(drawn, truths, "default")[1], abs=0.01)
    assert max(reward for reward in found if not math.isnan(reward)) > 0.05


@pytest.mark.parametrize("kind", ["llava", "unimed"])
def test_equal_answers_earn_exactly_the_same(kind):
    """Beside another, and beside those to another prompt: no rounding makes an advantage of nothing."""
    policy, data = build(kind), [row for row in rows(8) if row["masks"]][:2]
    seg, plain = policy.seg_token_id, policy.processor.text_ids("here")
    said = [[seg]] * 7 + [[*plain, seg], *[[*plain, seg, seg]] * 8]
    asked = [row | {"prompt": TASK.prompt(row)} for row in data]
    found = RewardFunctions([mask_reward(policy)])([asked[i // 8] for i in range(16)], [""] * 16, said, step=1, state=None)[:, 0]
    assert len(set(found[:7].tolist())) == len(set(found[8:].tolist())) == 1
    assert found[7] != found[0] and min(found[0], found[8]) > 0


def test_an_answer_without_its_masks_earns_nothing():
    policy, (row, *_) = build("llava"), rows(1)
    row |= {"prompt": TASK.prompt(row)}
    said = policy.processor.text_ids("I see nothing.")
    assert RewardFunctions([mask_reward(policy)])([row], [""], [said], step=1, state=None).tolist() == [[0.0]]


@pytest.mark.parametrize("kind", ["llava", "unimed"])
def test_grpo_learns_from_masks(tmp_path, kind):
    """Rows with and without masks: those without are scored by no function, and teach nothing."""
    policy = build(kind)
    policy.model.requires_grad_(True)
    settings = {"max_steps": 2, "beta": 0.04, "max_completion_length": 6, "num_generations": 2}
    data = [row | {"problem": f"{row['problem']} Draw."} for row in rows(8)]
    trainer = make_trainer("", tmp_path, policy=policy, rows=data, reward_funcs=[mask_reward(policy)], **settings)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2 and all(math.isfinite(row["loss"]) and "rewards/mask_iou/mean" in row for row in logged)
